"""Keeps steps that are not finite away from the weights, and brings all processes to the same decision.

To look at a loss, the host would have to wait for its device in every step. So the device itself leaves the optimizer's
step out, and the host reads the verdict one step later, when the matching has just waited for the device anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from run.progress import Progress
from util.distributed import all_gather_plain, barrier, get_rank, get_world_size, reduce_sum
from util.errors import InputError
from util.files import replacing
from util.logger import warn
from util.nested_tensor import NestedTensor
from util.preemption import StopRequest
from util.rng import torch_rng_states

Batches = list[tuple[NestedTensor, list[dict[str, Tensor]]]]


@dataclass
class Step:
    """Everything needed to report a step and to repeat it. Tensors are on the device, except the verdict."""

    place: dict[str, int]
    batches: Batches
    num_boxes: Tensor | None
    random: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None  # of the loss, in float16
    verdict: Tensor | None = None
    ready: torch.cuda.Event | None = None  # the verdict has reached the host


class StepGuard:
    """Watches over the steps of a training run.

    Args:
        model: whose weights and running statistics a step that is not finite leaves as they were.
        max_skipped: so many such steps of a run are only reported; one more ends it.
        dump_dir: where the step that ends the run is written for `scripts.replay`; None: nowhere.
        description: goes into that dump beside the weights: the flags.
        stop_request: true when this process is asked to end.

    `stopping` becomes true on all processes in the same step, once one of them is asked to end.
    """

    def __init__(
        self,
        model: nn.Module,
        max_skipped: int = 0,
        dump_dir: Path | None = None,
        description: dict[str, Any] | None = None,
        stop_request: StopRequest | None = None,
    ) -> None:
        self.model = model
        self.max_skipped = max_skipped
        self.dump_dir = dump_dir
        self.description = description or {}
        self.stop_request = StopRequest() if stop_request is None else stop_request
        self.stopping = False
        self.step: Step | None = None  # the latest
        self.unsettled: Step | None = None  # the latest whose verdict has not been read
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.statistics_before: list[Tensor] = []

    def begin(self, epoch: int, number: int, batches: Batches, num_boxes: Tensor | None = None) -> None:
        """Take note of a step before the model sees its batches; `num_boxes` is what its losses are divided by."""
        place = {"epoch": epoch, "step": number, "process": get_rank()}
        self.step = Step(place, batches, num_boxes, torch_rng_states())
        self.statistics_before = [buffer.clone() for buffer in self.statistics]

    def step_optimizer(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, losses: dict[str, Tensor], norm: Tensor
    ) -> Tensor:
        """Takes the optimizer's step unless the total `loss` or the gradients' total `norm` is not finite anywhere.

        Returns 0 where the step was taken and 1 where it was not, on the device.
        """
        loss_fails, norm_fails = ~losses["loss"].detach().isfinite(), ~norm.isfinite()
        # float16 gradients may overflow: the scaler then tries a smaller scale, and only a scale of 1 leaves no hope
        self.step.scale = scaler.scale(torch.ones_like(norm))
        hopeless = norm_fails & (self.step.scale <= 1)
        asked_to_end = torch.full_like(loss_fails, bool(self.stop_request))
        verdict = torch.stack([loss_fails | norm_fails, loss_fails | hopeless, asked_to_end])
        verdict = reduce_sum(verdict.float()).clamp(max=1)
        left_out = verdict[0]

        if optimizer.defaults.get("fused"):  # these look at `found_inf` on the device
            optimizer.found_inf = left_out
            optimizer.step()
            del optimizer.found_inf
        elif not left_out:
            optimizer.step()
        for buffer, before in zip(self.statistics, self.statistics_before, strict=True):
            buffer.copy_(torch.where(left_out > 0, before, buffer))

        self.step.losses = {name: value.detach() for name, value in losses.items()} | {"gradient norm": norm}
        self._send_to_host(verdict)
        return left_out

    def _send_to_host(self, verdict: Tensor) -> None:
        self.unsettled = self.step
        if not verdict.is_cuda:
            self.step.verdict = verdict
            return
        self.step.verdict = torch.empty_like(verdict, device="cpu", pin_memory=True)
        self.step.verdict.copy_(verdict, non_blocking=True)
        self.step.ready = torch.cuda.Event()
        self.step.ready.record()

    def settle(self, progress: Progress) -> None:
        """Reads the verdict on the latest step that has one.

        Raises:
            InputError: where it was not finite once too often, after it was written to `dump_dir`.
        """
        step, self.unsettled = self.unsettled, None
        if step is None:
            return
        if step.ready:
            step.ready.synchronize()
        _, failed, asked_to_end = step.verdict.tolist()
        self.stopping |= bool(asked_to_end)
        if failed:
            progress.skipped += 1
            self._report(step, progress.skipped)

    def _report(self, step: Step, skipped: int) -> None:
        values = {name: value.item() for name, value in step.losses.items()}
        shown = ("loss", "loss_ce", "loss_bbox", "loss_giou", "gradient norm")
        parts = ", ".join(f"{name} {values[name]:g}" for name in shown if name in values)
        ids = [int(target["image_id"]) for _, targets in step.batches for target in targets]
        where = f"process {get_rank()}: " if get_world_size() > 1 else ""
        story = "; ".join(all_gather_plain(f"{where}{parts} on images {ids}"))
        place = f"epoch {step.place['epoch']}, step {step.place['step']}"
        if skipped <= self.max_skipped:
            warn(f"not finite in {place}, skipped ({skipped} of at most {self.max_skipped}): {story}")
            return
        advice = self._dump(step) + "lower --lr, or go on without such steps by --skip_nonfinite N"
        barrier()  # the first process to end may take the others with it, and some still write
        raise InputError(f"training diverged in {place}, weights are as before: {story}; {advice}")

    def _dump(self, step: Step) -> str:
        """Writes the step to a file, and what the error says about it."""
        if self.dump_dir is None:
            return ""
        name = "nonfinite-epoch{epoch:04}-step{step:06}-process{process}.pth".format(**step.place)
        contents = {
            "place": step.place,
            "model": self.model.state_dict(),
            "batches": [(images.tensors, images.mask, list(targets)) for images, targets in step.batches],
            "num_boxes": step.num_boxes,
            "scale": step.scale,
            "processes": get_world_size(),
            "threads": torch.get_num_threads(),  # sums on CPUs depend on it
            "random": step.random,
            "losses": step.losses,
            **self.description,
        }
        with replacing(self.dump_dir / name) as file:
            torch.save(contents, file)
        return f"repeat it by python -m scripts.replay {self.dump_dir / name}; "
