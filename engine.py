"""One epoch of training and one pass of evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from datasets.coco_eval import CocoEvaluator, evaluation_as_plain_data
from util.checkpoint import save_on_master
from util.errors import InputError
from util.logger import MetricLogger, SmoothedValue

PRINT_FREQ = 10


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    max_norm: float = 0,
) -> dict[str, float]:
    """Trains on every batch once; gradients are clipped to a total norm of `max_norm` (0: not at all).

    Returns the means over steps and processes of the learning rate and of all losses, weighted and unweighted.

    Raises:
        InputError: where the loss or a gradient is not finite, before the weights are touched by it.
    """
    model.train()
    criterion.train()
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    for samples, targets in logger.log_every(data_loader, PRINT_FREQ, f"Epoch [{epoch}]"):
        samples, targets = to_device(samples, targets, device)
        losses = logged_losses(criterion(model(samples), targets), criterion.weight_dict)

        optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf)
        if not torch.isfinite(losses["loss"] + grad_norm):
            raise InputError(
                f"training diverged in epoch {epoch}: loss {losses['loss'].item()}, gradient norm {grad_norm.item()} "
                f"on images {[int(t['image_id']) for t in targets]}; resume with a lower --lr"
            )
        optimizer.step()
        logger.update(lr=optimizer.param_groups[0]["lr"], **losses)
    logger.synchronize_between_processes()
    return logger.averages()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: Iterable,
    base_ds: COCO,
    device: torch.device,
    output_dir: str | Path,
) -> tuple[dict[str, Any], CocoEvaluator]:
    """Measures losses and COCO's average precision; leaves the evaluator's arrays in `output_dir`/eval/latest.pth.

    Args:
        base_ds: the ground truth, of `datasets.get_coco_api_from_dataset`.
        output_dir: "" writes nothing.

    Returns the means of all losses with, as `coco_eval_bbox`, the 12 COCO numbers; and the evaluator.
    """
    model.eval()
    criterion.eval()
    logger = MetricLogger()
    evaluator = CocoEvaluator(base_ds, tuple(postprocessors))
    for samples, targets in logger.log_every(data_loader, PRINT_FREQ, "Test"):
        image_ids = [int(t["image_id"]) for t in targets]
        samples, targets = to_device(samples, targets, device)
        outputs = model(samples)
        logger.update(**logged_losses(criterion(outputs, targets), criterion.weight_dict))

        detections = postprocessors["bbox"](outputs, torch.stack([t["orig_size"] for t in targets]))
        evaluator.update(dict(zip(image_ids, detections, strict=True)))

    logger.synchronize_between_processes()
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    if output_dir:
        save_on_master(evaluation_as_plain_data(evaluator.coco_eval["bbox"]), Path(output_dir) / "eval" / "latest.pth")
    numbers = {f"coco_eval_{kind}": list(map(float, e.stats)) for kind, e in evaluator.coco_eval.items()}
    return logger.averages() | numbers, evaluator


def to_device(samples: Any, targets: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[Any, list[dict]]:
    """A batch on the device; from pinned memory without waiting for the copy."""
    targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
    return samples.to(device, non_blocking=True), targets


def logged_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """What a step reports: the total `loss`, its weighted parts, `class_error`, and everything as `.._unscaled`."""
    weighted = {name: losses[name] * weight for name, weight in weights.items()}
    unscaled = {f"{name}_unscaled": value for name, value in losses.items()}
    return {"loss": sum(weighted.values()), "class_error": losses["class_error"], **weighted, **unscaled}
