"""The benchmark's competitors, each in a process of its own; one of them is Hugging Face `transformers`.

In separate processes, a competitor and this code do not reuse memory that the other one has allocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from run.kernels import use_fast_kernels
from run.optim import build_optimizer
from run.step import autocast
from scripts.benchmarking.model import NUM_CLASSES, inference, random_batch, random_images
from scripts.benchmarking.timing import peak_mib, synchronize
from util.errors import InputError

Runs = dict[str, Callable[[], Any]]  # by --amp
PACKAGES = {
    "transformers": ("transformers",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
}  # packages that a competitor needs; the last one is its own


@dataclass
class PeerRun:
    """A run in the competitor's process, at the other end of `pipe`."""

    pipe: Connection
    peer: str
    amp: str

    def __call__(self) -> None:
        self.ask("run")

    def peak_mib(self) -> float | None:
        """Return the result of `scripts.benchmarking.timing.peak_mib` in the other process."""
        return self.ask("peak")

    def ask(self, request: str) -> Any:
        with naming(self.peer):
            self.pipe.send((request, self.amp))
            return self.pipe.recv()


@contextmanager
def naming(peer: str) -> Iterator[None]:
    """Raise InputError with the competitor's name if its process ends within the block."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise InputError(f"the process of {peer} has ended; pass --no_peer to measure without others") from error


def installed_version(peer: str) -> str | None:
    """Return the version of a competitor; None if one of the packages that it needs is not installed."""
    try:
        return [version(package) for package in PACKAGES[peer]][-1]
    except PackageNotFoundError:
        return None


def takes_part(peer: str, variant: str, flags: argparse.Namespace) -> bool:
    """Return whether a competitor is wanted and installed, and supports this variant and device."""
    fits = variant == "r50" if peer == "transformers" else flags.device == "cpu"
    return fits and not flags.no_peer and installed_version(peer) is not None


@contextmanager
def peer_runs(
    peer: str, variant: str, make: Callable[..., Runs], flags: argparse.Namespace, *args: Any
) -> Iterator[Runs]:
    """Yield the runs that `make(flags, *args)` returns in another process, which ends with the block.

    Yield {} if the competitor does not take part.
    """
    if not takes_part(peer, variant, flags):
        yield {}
        return
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make, flags, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        with naming(peer):
            precisions = pipe.recv()
        yield {amp: PeerRun(pipe, peer, amp) for amp in precisions}
    finally:
        process.terminate()
        process.join()


def serve(pipe: Connection, make: Callable[..., Runs], flags: argparse.Namespace, *args: Any) -> None:
    """Send the precisions of the runs, then answer the other process's requests until it ends this process."""
    device = torch.device(flags.device)
    use_fast_kernels(device)  # TF32 for both
    runs = make(flags, *args)
    pipe.send(list(runs))
    while True:
        request, amp = pipe.recv()
        if request == "peak":
            pipe.send(peak_mib(runs[amp], device))
        else:
            runs[amp]()
            synchronize(device)
            pipe.send(None)


def inference_of_transformers(flags: argparse.Namespace, images: int) -> Runs:
    """Return predictions for a batch of images."""
    model = build_transformers(flags.device).eval()
    pixels = random_images(images, flags.size, torch.device(flags.device)) / 255
    return {amp: inference(model, pixels, amp) for amp in flags.amp}


def training_of_transformers(flags: argparse.Namespace, batch_size: int) -> Runs:
    """Return training steps on a batch."""
    return {amp: TransformersStep(batch_size, amp, flags) for amp in flags.amp}


def build_transformers(device: str) -> nn.Module:
    """Return the R50 model of `transformers`, configured to do the same work as this code's model."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig

    config = ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage4"]),
        num_labels=NUM_CLASSES,
        auxiliary_loss=True,
        activation_dropout=0.1,
        attention_dropout=0.1,
    )
    model = ConditionalDetrForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "backbone" in name:  # its default is a frozen backbone; the recipe trains the last three stages
            parameter.requires_grad_(any(f"stages.{i}" in name for i in (1, 2, 3)))
    return model.to(device)


class TransformersStep:
    """Training step of the recipe on a batch of random images, with the model and losses of `transformers`."""

    def __init__(self, batch_size: int, amp: str, flags: argparse.Namespace) -> None:
        self.device = torch.device(flags.device)
        self.amp = amp
        self.model = build_transformers(flags.device).train()
        self.optimizer = build_optimizer(self.model, 1e-4, 1e-5, 1e-4)
        self.samples, self.targets = random_batch(batch_size, flags.size, self.device)

    def __call__(self) -> None:
        images, mask = self.samples.decompose()
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in self.targets]
        with autocast(self.device, self.amp):
            loss = self.model(pixel_values=images / 255, pixel_mask=~mask, labels=labels).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
