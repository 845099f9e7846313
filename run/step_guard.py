"""Guard against steps that are not finite: they do not change the weights, and can be repeated from a dump.

To read a loss, the host would have to wait for the device in every step. Therefore the device itself skips the
optimizer's step (`run.step`), and the host reports this one step later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from util.distributed import all_gather_plain, barrier, get_rank, get_world_size
from util.errors import InputError
from util.files import replacing
from util.logger import warn
from util.nested_tensor import NestedTensor
from util.rng import torch_rng_states

Batches = list[tuple[NestedTensor, list[dict[str, Tensor]]]]


@dataclass
class TakenStep:
    """All that is needed to report a step and to repeat it. Tensors are on the device."""

    place: dict[str, int]
    batches: Batches
    num_boxes: Tensor
    random: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None  # of the loss, in float16


class StepGuard:
    """Guard over the steps of a training run.

    Args:
        model: its weights and running statistics stay unchanged by steps that are not finite.
        max_skipped: the number of such steps in a run that are only reported; one more ends it.
        dump_dir: the folder to which the step that ends the run is written for `scripts.replay`; None: no dump.
        description: the flags, which are stored in this dump next to the weights.

    `skipped` is the number of steps so far that were not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        max_skipped: int = 0,
        dump_dir: Path | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.max_skipped = max_skipped
        self.dump_dir = dump_dir
        self.description = description or {}
        self.skipped = 0
        self.statistics = running_statistics(model)
        self.statistics_before: list[Tensor] = []

    def begin(self, epoch: int, number: int, batches: Batches, num_boxes: Tensor) -> TakenStep:
        """Record a step before the model sees its batches; its losses are divided by `num_boxes`."""
        place = {"epoch": epoch, "step": number, "process": get_rank()}
        self.statistics_before = [buffer.clone() for buffer in self.statistics]
        return TakenStep(place, batches, num_boxes, torch_rng_states())

    @staticmethod
    def look_at(step: TakenStep, losses: dict[str, Tensor], norm: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return two bools [] on the device: this process's step must be skipped, and it counts as a failure.

        Args:
            step: the record of the step, which stores the other arguments for a report.
            losses: the losses, with the total `loss`.
            norm: the total norm of the gradients.
            scale: the scale of the loss. float16 gradients may overflow: the scaler then tries a smaller scale, and
                this only counts as a failure at a scale of 1.
        """
        step.losses = {name: value.detach() for name, value in losses.items()} | {"gradient norm": norm}
        step.scale = scale
        loss_fails, norm_fails = ~losses["loss"].detach().isfinite(), ~norm.isfinite()
        return loss_fails | norm_fails, loss_fails | (norm_fails & (scale <= 1))

    def undo_statistics(self, left_out: Tensor) -> None:
        """Reset the running statistics of trained norms to their values before the step, if `left_out` is 1."""
        for buffer, before in zip(self.statistics, self.statistics_before, strict=True):
            buffer.copy_(torch.where(left_out > 0, before, buffer))

    def report(self, step: TakenStep) -> None:
        """Report a step that failed.

        Raises:
            InputError: if it exceeds the limit, after it was written to `dump_dir`.
        """
        self.skipped += 1
        values = {name: value.item() for name, value in step.losses.items()}
        shown = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice", "gradient norm")
        parts = ", ".join(f"{name} {values[name]:g}" for name in shown if name in values)
        ids = [int(target["image_id"]) for _, targets in step.batches for target in targets]
        where = f"process {get_rank()}: " if get_world_size() > 1 else ""
        story = "; ".join(all_gather_plain(f"{where}{parts} on images {ids}"))
        place = f"epoch {step.place['epoch']}, step {step.place['step']}"
        if self.skipped <= self.max_skipped:
            warn(f"not finite in {place}, skipped ({self.skipped} of at most {self.max_skipped}): {story}")
            return
        advice = self._dump(step) + "lower --lr, or continue without such steps with --skip_nonfinite N"
        barrier()  # the end of one process may end others, which may still be writing their dump
        raise InputError(f"training diverged in {place}, weights are as before: {story}; {advice}")

    def _dump(self, step: TakenStep) -> str:
        """Write the step to a file, and return the part of the error about it."""
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


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model's trained batch norms."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]
