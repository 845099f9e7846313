"""Benchmarks of this code: forward passes of a model variant on random images, and steps of its training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from main import get_args_parser
from models import build_model
from models.criterion import SetCriterion
from models.detector import Detector
from models.segmentation import DETRsegm
from run.optim import build_optimizer
from run.step import Step, autocast, logged_losses
from scripts.benchmarking.timing import synchronize
from util.nested_tensor import NestedTensor

BACKBONES = {
    "r50": (),
    "r50dc5": ("--dilation",),
    "r101": ("--backbone", "resnet101"),
    "r101dc5": ("--backbone", "resnet101", "--dilation"),
}
VARIANTS = BACKBONES | {f"detr_{name}": ("--model", "detr", *flags) for name, flags in BACKBONES.items()}
# Parameters in millions and multiply-adds in billions, the mean of COCO val2017's first 100 images.
PUBLISHED = {
    **{"r50": (44, 90), "r50dc5": (44, 195), "r101": (63, 156), "r101dc5": (63, 262)},
    **{"detr_r50": (41, 86), "detr_r50dc5": (41, 187), "detr_r101": (60, 152), "detr_r101dc5": (60, 253)},
}
PRECISIONS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by --amp
NUM_CLASSES = 91
BOXES = 7  # per image, about the mean of COCO


def build(variant: str, device: torch.device, *more: str) -> tuple[Detector | DETRsegm, SetCriterion]:
    """Return a variant's model and criterion with random weights."""
    model, criterion, _ = build_model(flags_of(variant, device, *more))
    return model.to(device), criterion


def flags_of(variant: str, device: torch.device | str, *more: str) -> argparse.Namespace:
    """Return the flags of a variant."""
    flags = ["--device", str(device), "--num_classes", str(NUM_CLASSES), *VARIANTS[variant], *more]
    return get_args_parser().parse_args(flags)


def random_images(images: int, size: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 3, *size), dtype=torch.uint8, generator=generator).to(device)


def random_targets(images: int, size: tuple[int, int], device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(1, NUM_CLASSES, (BOXES,), generator=generator).to(device),
            "boxes": (torch.rand(BOXES, 4, generator=generator) * 0.3 + 0.3).to(device),
            "masks": torch.randint(2, (BOXES, *size), dtype=torch.uint8, generator=generator).to(device),
        }
        for _ in range(images)
    ]


def random_batch(
    images: int, size: tuple[int, int], device: torch.device
) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Return images without padding, and their targets."""
    pixels = random_images(images, size, device)
    mask = pixels.new_zeros(pixels[:, 0].shape, dtype=torch.bool)
    return NestedTensor(pixels, mask, has_padding=False), random_targets(images, size, device)


def inference(model: nn.Module, inputs: Tensor, amp: str) -> Callable[[], None]:
    """Return a run of a forward pass, as in detection."""

    def run() -> None:
        with torch.inference_mode(), autocast(inputs.device, amp):
            model(inputs)

    return run


class TrainingStep:
    """Training step of the recipe on a batch of random images of one size."""

    def __init__(
        self, model: nn.Module, criterion: SetCriterion, batch_size: int, amp: str, flags: argparse.Namespace
    ) -> None:
        self.device = torch.device(flags.device)
        self.step = Step(model.train(), criterion, build_optimizer(model, 1e-4, 1e-5, 1e-4), max_norm=0.1, amp=amp)
        self.samples, self.targets = random_batch(batch_size, flags.size, self.device)

    def __call__(self) -> None:
        self.step([(self.samples, self.targets)])

    def split(self, repeats: int) -> dict[str, float]:
        """Return the median milliseconds of each part of the step; each part waits for the device at its end."""
        times: dict[str, list[float]] = {}

        def timed(name: str, part: Callable[..., Any], *inputs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = part(*inputs)
            synchronize(self.device)
            times.setdefault(f"{name} ms", []).append(1e3 * (time.perf_counter() - start))
            return result

        for _ in range(repeats):
            self.take_parts(timed)
        return {name: round(median(values), 1) for name, values in times.items()}

    def take_parts(self, measured: Callable[..., Any]) -> None:
        """Take a step whose parts are called by `measured(name, part, *inputs)`, which returns their results."""
        step, criterion = self.step, self.step.criterion
        nothing_left_out = torch.zeros((), device=self.device)

        def clip_and_step() -> None:
            step.clip_gradients()
            step.step_optimizer(nothing_left_out)

        outputs = measured("forward", step.forward, self.samples)
        layers = [outputs, *outputs["aux_outputs"]]
        predictions = [torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes")]
        measured("matching", criterion.matcher.match, *predictions, self.targets, criterion.num_groups)
        losses = measured("matching and losses", criterion, outputs, self.targets)
        loss = logged_losses(losses, criterion.weight_dict)["loss"]
        step.optimizer.zero_grad()
        measured("backward", step.scaler.scale(loss).backward)
        measured("clip and AdamW", clip_and_step)
        step.scaler.update()
