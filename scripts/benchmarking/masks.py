"""Benchmark of the mask head: masks of only the needed queries, in turns with masks of all queries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from models.detector import Detector
from models.segmentation import DETRsegm, QueryMasks
from run.step import autocast
from scripts.benchmarking.model import PRECISIONS, TrainingStep, flags_of, random_images
from scripts.benchmarking.timing import alternate, peak_mib

KINDS = {"masks needed": False, "masks of all queries": True}


class AllQueryMasks(QueryMasks):
    """Masks of a batch that are always computed for all queries."""

    @cached_property
    def every(self) -> Tensor:
        """The mask logits of all queries, [B, Q, H / 4, W / 4]."""
        return self.all()

    def of(self, queries: Sequence[Tensor]) -> Tensor:
        """Return the mask logits [M, H / 4, W / 4] of chosen queries."""
        return torch.cat([masks[chosen] for masks, chosen in zip(self.every, queries, strict=True)])


class WithAllMasks(nn.Module):
    """A model whose outputs compute the masks of all queries."""

    def __init__(self, model: Detector | DETRsegm) -> None:
        super().__init__()
        assert isinstance(model, DETRsegm)
        self.model = model

    def forward(self, samples: Any) -> dict[str, Any]:
        """Return the outputs of the model."""
        outputs = self.model(samples)
        return outputs | {"masks": AllQueryMasks(self.model, outputs["masks"].embeddings)}


def measure_masks(variant: str, flags: argparse.Namespace, _machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure training steps of two images and the detection of one image with masks."""
    device = torch.device(flags.device)
    measured = []
    for amp in flags.amp:
        precision = {"model": variant, "precision": PRECISIONS[amp]}
        for task, make in (("training, batch of 2", training_run), ("detection", detection_run)):
            runs = {kind: make(variant, all_masks, amp, flags) for kind, all_masks in KINDS.items()}
            for kind, seconds in alternate(runs, device, flags.repeats).items():
                row = {"task": task, "masks": kind, "ms": round(1e3 * seconds, 1)}
                measured.append(precision | row | {"peak MiB": peak_mib(runs[kind], device)})
            del runs
    return measured


def training_run(variant: str, all_masks: bool, amp: str, flags: argparse.Namespace) -> Callable[[], None]:
    """Return a training step of two images."""
    model, criterion, _ = build_model(flags_of(variant, flags.device, "--masks"))
    model = model.to(flags.device)
    return TrainingStep(WithAllMasks(model) if all_masks else model, criterion, 2, amp, flags)


def detection_run(variant: str, all_masks: bool, amp: str, flags: argparse.Namespace) -> Callable[[], None]:
    """Return a run that detects the objects in an image, with masks at the image's size."""
    model, _, postprocessors = build_model(flags_of(variant, flags.device, "--masks", "--no_aux_loss"))
    model = model.to(flags.device).eval()
    network = WithAllMasks(model) if all_masks else model
    device = torch.device(flags.device)
    image = random_images(1, flags.size, device)
    targets = [{"orig_size": torch.tensor(flags.size), "size": torch.tensor(flags.size)}]

    def run() -> None:
        with torch.inference_mode():
            with autocast(device, amp):
                outputs = network(image)
            found: list[dict[str, Any]] = [{}]
            for postprocessor in postprocessors.values():
                found = postprocessor.extend(found, outputs, targets)

    return run
