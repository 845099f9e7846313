"""One epoch of training and one pass of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from datasets.coco_eval import CocoEvaluator, evaluation_as_plain_data
from evaluation.evaluators import COCO_TYPES, Evaluator, coco_evaluator
from evaluation.panoptic_quality import PanopticEvaluator
from models.criterion import SetCriterion
from models.prepared import prepare
from run.progress import Progress
from run.step import Step, autocast, logged_losses
from util.distributed import all_gather_plain
from util.files import save_on_master
from util.logger import MetricLogger, SizedIterable, warn

PRINT_FREQ = 10


def train_one_epoch(
    model: nn.Module,
    criterion: SetCriterion,
    data_loader: SizedIterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    max_norm: float = 0,
) -> dict[str, float]:
    """Train on every batch once; gradients are clipped to a total norm of `max_norm` (0: not at all).

    Return the means over steps and processes of the learning rate and of all losses, weighted and unweighted.

    Raises:
        InputError: if the loss or a gradient is not finite; the weights are then as before this step.
    """
    return take_steps(Step(model, criterion, optimizer, max_norm), data_loader, device, epoch, Progress())


def take_steps(
    step: Step,
    data_loader: SizedIterable,
    device: torch.device,
    epoch: int,
    progress: Progress,
    after_step: Callable[[], None] = lambda: None,
    later_steps: int = 0,
) -> dict[str, float]:
    """Train like `train_one_epoch`, with any settings of the step, from any position within the epoch.

    Args:
        step: called with the batches of each step; batches at the end that are too few for a step are dropped.
        progress: the position within the epoch; in an interrupted epoch, the loader yields the remaining batches.
        after_step: called after every step.
        later_steps: the number of steps in later epochs, for the remaining time of the run in the log.
    """
    step.model.train()
    step.criterion.train()
    logger = progress.logger
    batches_of_steps = InGroups(data_loader, step.accum_steps)
    for batches in logger.log_every(batches_of_steps, PRINT_FREQ, f"Epoch [{epoch}]", progress.step, later_steps):
        batches = [to_device(samples, targets, device) for samples, targets in batches]
        losses, left_out = step(batches, epoch, progress.step)
        logger.update(left_out, lr=step.optimizer.param_groups[0]["lr"], **losses)
        progress.step += 1
        after_step()
    step.settle()
    report_skipped(data_loader)
    logger.synchronize_between_processes()
    return logger.averages()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion,
    postprocessors: Mapping[str, Any],
    data_loader: SizedIterable,
    base_ds: COCO | None,
    device: torch.device,
    output_dir: str | Path,
    amp: str = "none",
    panoptic: PanopticEvaluator | None = None,
) -> tuple[dict[str, Any], CocoEvaluator | None]:
    """Measure losses and COCO's average precision; write the evaluator's arrays to `output_dir`/eval/latest.pth.

    Args:
        base_ds: the ground truth, from `datasets.get_coco_api_from_dataset`; None: AP is not measured.
        output_dir: the folder of the run; "": nothing is written.
        amp: the precision of the model's forward pass, none or a key of `AUTOCAST`.
        panoptic: the evaluator of panoptic quality, if this is measured as well.

    Return a dict with the means of all losses and, as `coco_eval_bbox`, the 12 COCO numbers; and the evaluator of AP.
    """
    criterion.eval()
    logger = MetricLogger()

    def measure(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> None:
        logger.update(**logged_losses(criterion(outputs, targets), criterion.weight_dict))

    coco = coco_evaluator(postprocessors, base_ds) if base_ds else None
    evaluators = [evaluator for evaluator in (coco, panoptic) if evaluator]
    needed = {kind: p for kind, p in postprocessors.items() if coco or kind not in COCO_TYPES}
    detect(model, needed, data_loader, evaluators, device, amp, logger, measure)
    logger.synchronize_between_processes()
    stats: dict[str, Any] = logger.averages()
    for evaluator in evaluators:
        evaluator.accumulate()
        evaluator.summarize()
        stats |= evaluator.stats
    if output_dir and coco:
        arrays = evaluation_as_plain_data(coco.coco_eval["bbox"])
        save_on_master(arrays, Path(output_dir) / "eval" / "latest.pth")
    return stats, coco


@torch.no_grad()
def detect(
    model: nn.Module,
    postprocessors: Mapping[str, Any],
    data_loader: SizedIterable,
    evaluators: Sequence[Evaluator],
    device: torch.device,
    amp: str = "none",
    logger: MetricLogger | None = None,
    on_batch: Callable[[dict[str, Tensor], list[dict[str, Tensor]]], None] = lambda outputs, targets: None,
) -> None:
    """Pass a model's detections in all images, on all processes, to evaluators, which do not score them yet.

    Args:
        logger: shows the progress, and the values that `on_batch` adds.
        on_batch: called with the model's outputs and the targets of every batch.

    The other arguments are those of `evaluate`.
    """
    model = prepare(model.eval())
    logger = logger or MetricLogger()
    for samples, targets in logger.log_every(data_loader, PRINT_FREQ, "Test"):
        image_ids = [int(t["image_id"]) for t in targets]
        samples, targets = to_device(samples, targets, device)
        with autocast(device, amp):
            outputs = model(samples)
        on_batch(outputs, targets)
        detections: list[dict[str, Any]] = [{} for _ in targets]
        for postprocessor in postprocessors.values():
            detections = postprocessor.extend(detections, outputs, targets)
        for evaluator in evaluators:
            evaluator.update(dict(zip(image_ids, detections, strict=True)))

    report_skipped(data_loader)
    for evaluator in evaluators:
        evaluator.synchronize_between_processes()


class InGroups:
    """Batches of a loader in groups of `size`, without an incomplete last group."""

    def __init__(self, loader: SizedIterable, size: int) -> None:
        self.loader = loader
        self.size = size

    def __len__(self) -> int:
        return len(self.loader) // self.size

    def __iter__(self) -> Iterator[tuple]:
        return zip(*[iter(self.loader)] * self.size, strict=False)


def report_skipped(data_loader: SizedIterable) -> None:
    """Warn about the images that the processes have skipped, if the loader's data set can skip images."""
    dataset: Any = getattr(data_loader, "dataset", None)
    take_skipped = getattr(dataset, "take_skipped", list)
    if positions := set().union(*all_gather_plain(take_skipped())):
        warn(dataset.describe_skipped(positions))


def to_device(samples: Any, targets: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[Any, list[dict]]:
    """Copy a batch to the device and return it; with pinned memory, the host does not wait for the copy."""
    targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
    return samples.to(device, non_blocking=True), targets
