"""What the benchmark measures of this code: a variant's model on random images, and a step of its training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from engine import autocast, logged_losses
from main import get_args_parser
from models import build_model
from run.optim import build_optimizer
from scripts.benchmarking.timing import synchronize
from util.nested_tensor import NestedTensor

VARIANTS = {
    "r50": (),
    "r50dc5": ("--dilation",),
    "r101": ("--backbone", "resnet101"),
    "r101dc5": ("--backbone", "resnet101", "--dilation"),
}
NUM_CLASSES = 91
BOXES = 7  # an image, about as many as COCO has


def build(variant: str, device: torch.device, *more: str) -> tuple[nn.Module, nn.Module]:
    """A variant's model and criterion with random weights."""
    flags = ["--device", str(device), "--num_classes", str(NUM_CLASSES), *VARIANTS[variant], *more]
    model, criterion, _ = build_model(get_args_parser().parse_args(flags))
    return model.to(device), criterion


def random_images(images: int, size: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 3, *size), dtype=torch.uint8, generator=generator).to(device)


def random_targets(images: int, device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(1, NUM_CLASSES, (BOXES,), generator=generator).to(device),
            "boxes": (torch.rand(BOXES, 4, generator=generator) * 0.3 + 0.3).to(device),
        }
        for _ in range(images)
    ]


def inference(model: nn.Module, inputs: Tensor, amp: str) -> Callable[[], None]:
    """A forward pass as those of detection are."""

    def run() -> None:
        with torch.inference_mode(), autocast(inputs.device, amp):
            model(inputs)

    return run


class TrainingStep:
    """A step of the recipe on a batch of random images of one size."""

    def __init__(
        self, model: nn.Module, criterion: nn.Module | None, batch_size: int, amp: str, flags: argparse.Namespace
    ) -> None:
        self.device = torch.device(flags.device)
        self.model = model.train()
        self.criterion = criterion
        self.amp = amp
        self.optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
        images = random_images(batch_size, flags.size, self.device)
        self.samples = NestedTensor(images, images.new_zeros(images[:, 0].shape, dtype=torch.bool), has_padding=False)
        self.targets = random_targets(batch_size, self.device)

    def __call__(self) -> None:
        self.update(self.loss(self.forward()))

    def forward(self) -> dict[str, Any]:
        with autocast(self.device, self.amp):
            return self.model(self.samples)

    def matching(self, outputs: dict[str, Any]) -> None:
        """What `loss` begins with."""
        layers = [outputs, *outputs["aux_outputs"]]
        self.criterion.matcher(
            *(torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes")), self.targets
        )

    def loss(self, outputs: dict[str, Any]) -> Tensor:
        return logged_losses(self.criterion(outputs, self.targets), self.criterion.weight_dict)["loss"]

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.step()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def split(self, repeats: int) -> dict[str, float]:
        """The median milliseconds of the parts, with a wait for the device behind each."""
        times: dict[str, list[float]] = {}

        def timed(name: str, part: Callable[..., Any], *inputs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = part(*inputs)
            synchronize(self.device)
            times.setdefault(f"{name} ms", []).append(1e3 * (time.perf_counter() - start))
            return result

        for _ in range(repeats):
            outputs = timed("forward", self.forward)
            timed("matching", self.matching, outputs)
            loss = timed("matching and losses", self.loss, outputs)
            self.optimizer.zero_grad()
            timed("backward", loss.backward)
            timed("clip and AdamW", self.step)
        return {name: round(median(values), 1) for name, values in times.items()}
