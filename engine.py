"""One epoch of training and one pass of evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.coco_eval import CocoEvaluator, evaluation_as_plain_data
from run.progress import Progress
from run.step_guard import StepGuard
from util.distributed import all_gather_plain
from util.files import save_on_master
from util.logger import MetricLogger, warn

PRINT_FREQ = 10
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    max_norm: float = 0,
    amp: str = "none",
    accum_steps: int = 1,
    progress: Progress | None = None,
    guard: StepGuard | None = None,
    after_step: Callable[[], None] = lambda: None,
    later_steps: int = 0,
) -> dict[str, float]:
    """Trains on every batch once; gradients are clipped to a total norm of `max_norm` (0: not at all).

    Args:
        amp: the precision of the model's forward pass, none or a key of `AUTOCAST`.
        accum_steps: so many batches make one step, as if they were one batch; left-over ones are dropped.
        progress: what an interrupted epoch had gathered; the loader then yields the remaining batches.
        guard: decides about steps that are not finite; by default the first one ends the run.
        after_step: called after every step.
        later_steps: number of steps in the epochs after this one, for the remaining time of the run in the log.

    Returns the means over steps and processes of the learning rate and of all losses, weighted and unweighted.

    Raises:
        InputError: where the loss or a gradient is not finite; the weights are those before this step.
    """
    model.train()
    criterion.train()
    progress = progress or Progress()
    guard = guard or StepGuard(model)
    logger, scaler = progress.logger, progress.scaler
    steps = Steps(data_loader, accum_steps)
    for batches in logger.log_every(steps, PRINT_FREQ, f"Epoch [{epoch}]", progress.step, later_steps):
        batches = [to_device(samples, targets, device) for samples, targets in batches]
        num_boxes = criterion.mean_num_boxes([target for _, targets in batches for target in targets], device)
        guard.begin(epoch, progress.step, batches, num_boxes)
        optimizer.zero_grad()
        # the matching has just waited for the device, so the last step's verdict is there
        settle = partial(guard.settle, progress)
        losses = compute_gradients(model, criterion, batches, num_boxes, device, amp, scaler, settle)

        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf)
        left_out = guard.step_optimizer(optimizer, scaler, losses, grad_norm)
        scaler.update()
        logger.update(left_out, lr=optimizer.param_groups[0]["lr"], **losses)
        progress.step += 1
        after_step()
    guard.settle(progress)
    report_skipped(data_loader)
    logger.synchronize_between_processes()
    return logger.averages()


def compute_gradients(
    model: nn.Module,
    criterion: nn.Module,
    batches: list[tuple[Any, list[dict[str, Tensor]]]],
    num_boxes: Tensor,
    device: torch.device,
    amp: str,
    scaler: torch.amp.GradScaler,
    after_matching: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Add the scaled gradients of a step's batches to those of the parameters, and return the losses of the step.

    `num_boxes` is that of all batches; `after_matching` is called for each batch, before its gradients are computed.
    """
    parts = []
    for samples, targets in batches:
        with autocast(device, amp), sync_gradients(model, last=len(parts) == len(batches) - 1):
            outputs = model(samples)
        parts.append(logged_losses(criterion(outputs, targets, num_boxes), criterion.weight_dict))
        after_matching()
        scaler.scale(parts[-1]["loss"]).backward()
    return sum_of_losses(parts)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: Iterable,
    base_ds: COCO,
    device: torch.device,
    output_dir: str | Path,
    amp: str = "none",
) -> tuple[dict[str, Any], CocoEvaluator]:
    """Measures losses and COCO's average precision; leaves the evaluator's arrays in `output_dir`/eval/latest.pth.

    Args:
        base_ds: the ground truth, of `datasets.get_coco_api_from_dataset`.
        output_dir: "" writes nothing.
        amp: the precision of the model's forward pass, none or a key of `AUTOCAST`.

    Returns the means of all losses with, as `coco_eval_bbox`, the 12 COCO numbers; and the evaluator.
    """
    criterion.eval()
    logger = MetricLogger()

    def measure(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> None:
        logger.update(**logged_losses(criterion(outputs, targets), criterion.weight_dict))

    evaluator = detect(model, postprocessors, data_loader, base_ds, device, amp, logger, measure)
    logger.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    if output_dir:
        save_on_master(evaluation_as_plain_data(evaluator.coco_eval["bbox"]), Path(output_dir) / "eval" / "latest.pth")
    numbers = {f"coco_eval_{kind}": list(map(float, e.stats)) for kind, e in evaluator.coco_eval.items()}
    return logger.averages() | numbers, evaluator


@torch.no_grad()
def detect(
    model: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: Iterable,
    base_ds: COCO,
    device: torch.device,
    amp: str = "none",
    logger: MetricLogger | None = None,
    on_batch: Callable[[dict[str, Tensor], list[dict[str, Tensor]]], None] = lambda outputs, targets: None,
) -> CocoEvaluator:
    """What a model finds in all images, gathered from all processes: an evaluator that has scored nothing yet.

    Args:
        logger: shows the progress, and what `on_batch` adds.
        on_batch: called with the model's outputs and the targets of every batch.

    The others as for `evaluate`.
    """
    model.eval()
    logger = logger or MetricLogger()
    evaluator = CocoEvaluator(base_ds, tuple(postprocessors), getattr(postprocessors["bbox"], "num_detections", 100))
    for samples, targets in logger.log_every(data_loader, PRINT_FREQ, "Test"):
        image_ids = [int(t["image_id"]) for t in targets]
        samples, targets = to_device(samples, targets, device)
        with autocast(device, amp):
            outputs = model(samples)
        on_batch(outputs, targets)
        detections = postprocessors["bbox"](outputs, torch.stack([t["orig_size"] for t in targets]))
        evaluator.update(dict(zip(image_ids, detections, strict=True)))

    report_skipped(data_loader)
    evaluator.synchronize_between_processes()
    return evaluator


class Steps:
    """The batches of a loader, `accum_steps` at a time, without an incomplete last group."""

    def __init__(self, loader: Iterable, accum_steps: int) -> None:
        self.loader = loader
        self.accum_steps = accum_steps

    def __len__(self) -> int:
        return len(self.loader) // self.accum_steps

    def __iter__(self) -> Iterator[tuple]:
        return zip(*[iter(self.loader)] * self.accum_steps, strict=False)


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of a forward pass in the precision `amp`."""
    return nullcontext() if amp == "none" else torch.autocast(device.type, AUTOCAST[amp])


def sync_gradients(model: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a batch's forward pass: on several processes, only the `last` of a step sends its gradients."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def sum_of_losses(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The losses of a step from those of its batches, which share one num_boxes; errors are averaged."""
    if len(parts) == 1:
        return parts[0]
    totals = {name: sum(part[name].detach() for part in parts) for name in parts[0]}
    return {name: total / len(parts) if "error" in name else total for name, total in totals.items()}


def report_skipped(data_loader: Iterable) -> None:
    """Says which images all processes have skipped; the data of users' own loaders skip none."""
    take_skipped = getattr(getattr(data_loader, "dataset", None), "take_skipped", list)
    if positions := set().union(*all_gather_plain(take_skipped())):
        warn(data_loader.dataset.describe_skipped(positions))


def to_device(samples: Any, targets: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[Any, list[dict]]:
    """A batch on the device; from pinned memory without waiting for the copy."""
    targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
    return samples.to(device, non_blocking=True), targets


def logged_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """What a step reports: the total `loss`, its weighted parts, `class_error`, and everything as `.._unscaled`."""
    weighted = {name: losses[name] * weight for name, weight in weights.items()}
    unscaled = {f"{name}_unscaled": value for name, value in losses.items()}
    return {"loss": sum(weighted.values()), "class_error": losses["class_error"], **weighted, **unscaled}
