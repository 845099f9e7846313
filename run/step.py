"""Training step, which training, replay and benchmark share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.classification import Totals
from models.criterion import SetCriterion
from run.agreement import Agreement
from run.average import MovingAverage
from run.step_guard import Batches, StepGuard, TakenStep
from util.preemption import StopRequest

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Training step on one or more batches, which count as one large batch.

    Args:
        model: the model, wrapped if there are several processes.
        criterion: the losses of the model.
        optimizer: the optimizer of the model's parameters.
        max_norm: gradients are clipped to this total norm; 0: no clipping.
        amp: the precision of the model's forward pass, none or a key of `AUTOCAST`.
        accum_steps: the number of batches per step.
        guard: decides what happens after a step that is not finite; by default, the first one ends the run.
        stop_request: true once this process is asked to stop.
        average: the moving average of the model's weights, updated after each step; None: no average.

    `stopping` becomes true on all processes in the same step, once one of them is asked to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        max_norm: float = 0,
        amp: str = "none",
        accum_steps: int = 1,
        guard: StepGuard | None = None,
        stop_request: StopRequest | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.max_norm = max_norm if max_norm > 0 else math.inf
        self.amp = amp
        self.accum_steps = accum_steps
        self.guard = guard or StepGuard(model)
        self.stop_request = StopRequest() if stop_request is None else stop_request
        self.average = average
        self.stopping = False
        self.agreement = Agreement()
        self.unsettled: TakenStep | None = None  # the latest step whose answers have not been read
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")

    def __call__(self, batches: Batches, epoch: int = 0, number: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Train on batches that are on the device, in step `number` of an epoch.

        Return the losses of the step, and 1 if it was skipped because it was not finite on some process, else 0.

        Raises:
            InputError: if the previous step was not finite, and this exceeds the limit of such steps.
        """
        targets = [target for _, of_batch in batches for target in of_batch]
        totals = self.criterion.totals(targets, self.device)
        taken = self.guard.begin(epoch, number, batches, totals.num_boxes)
        self.optimizer.zero_grad()
        losses = self.compute_gradients(batches, totals, after_matching=self.settle)
        norm = self.clip_gradients()
        scale = self.scaler.scale(torch.ones_like(norm))
        asked_to_stop = torch.full_like(norm, bool(self.stop_request), dtype=torch.bool)
        not_finite, *_ = self.agreement.reach(*self.guard.look_at(taken, losses, norm, scale), asked_to_stop)
        self.unsettled = taken
        self.step_optimizer(not_finite)
        self.guard.undo_statistics(not_finite)
        if self.average:
            self.average.update(not_finite)
        self.scaler.update()
        return losses, not_finite

    def compute_gradients(
        self, batches: Batches, totals: Totals, after_matching: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Add the scaled gradients of the batches to the parameters' gradients, and return the losses of the step.

        `totals` are computed over all batches; `after_matching` is called for each batch before its gradients are
        computed, when the matching has just waited for the device.
        """
        parts: list[dict[str, Tensor]] = []
        for samples, targets in batches:
            with sync_gradients(self.model, last=len(parts) == len(batches) - 1):
                outputs = self.forward(samples)
            parts.append(logged_losses(self.criterion(outputs, targets, totals), self.criterion.weight_dict))
            after_matching()
            self.scaler.scale(parts[-1]["loss"]).backward()
        return sum_of_losses(parts)

    def forward(self, samples: Any) -> dict[str, Any]:
        """Return the model's outputs in the step's precision."""
        with autocast(self.device, self.amp):
            return self.model(samples)

    def clip_gradients(self) -> Tensor:
        """Unscale the gradients, clip them, and return their total norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def step_optimizer(self, leave_out: Tensor) -> None:
        """Let the optimizer change the weights, unless `leave_out` is 1; the host does not wait for its value."""
        if self.optimizer.defaults.get("fused"):  # fused optimizers read `found_inf` on the device
            self.optimizer.found_inf = leave_out  # type: ignore[attr-defined]  # which torch does not declare
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif not leave_out:
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides weights and optimizer, as plain data and tensors."""
        average = {"ema": self.average.state_dict()} if self.average else {}
        return {"scaler": self.scaler.state_dict(), "skipped": self.guard.skipped, **average}

    def restore(self, checkpoint: dict[str, Any], source: str) -> None:
        """Restore this state from a checkpoint; published checkpoints have none.

        Raise InputError if the averaged weights do not fit; `source` names the checkpoint.
        """
        if self.average and "ema" in checkpoint:
            self.average.restore(checkpoint["ema"], source)
        self.guard.skipped = checkpoint.get("skipped", 0)
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])

    def settle(self) -> None:
        """Read the common answers about the previous step, and act on them.

        Raises:
            InputError: if the step was not finite, and this exceeds the limit of such steps.
        """
        taken, self.unsettled = self.unsettled, None
        if taken is None:
            return
        _, failed, asked_to_stop = self.agreement.read()
        self.stopping |= asked_to_stop
        if failed:
            self.guard.report(taken)


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Return the context of a forward pass in the precision `amp`."""
    return nullcontext() if amp == "none" else torch.autocast(device.type, AUTOCAST[amp])


def sync_gradients(model: nn.Module, last: bool) -> AbstractContextManager:
    """Return the context of a batch's forward pass; processes send gradients only after the last batch of a step."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def logged_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """Return the losses for the log: the total `loss`, its weighted parts, `class_error`, and all as `.._unscaled`."""
    weighted = {name: losses[name] * weight for name, weight in weights.items() if name in losses}
    unscaled = {f"{name}_unscaled": value for name, value in losses.items()}
    return {"loss": total_of(weighted.values()), "class_error": losses["class_error"], **weighted, **unscaled}


def sum_of_losses(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the losses of a step: sums over its batches, which share their totals, and means of the errors."""
    if len(parts) == 1:
        return parts[0]
    totals = {name: total_of(part[name].detach() for part in parts) for name in parts[0]}
    return {name: total / len(parts) if "error" in name else total for name, total in totals.items()}


def total_of(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors, added one after the other."""
    return reduce(operator.add, values)
