"""The benchmark's competitor: Hugging Face `transformers`, in a separate process.

In its own process, it does not reuse memory that this code has allocated, nor the other way round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
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

Runs = dict[str, Callable[[], None]]  # by --amp


@dataclass
class PeerRun:
    """Run in the other process, at the other end of `pipe`."""

    pipe: Connection
    amp: str

    def __call__(self) -> None:
        self.ask("run")

    def peak_mib(self) -> float | None:
        """Return the result of `scripts.benchmarking.timing.peak_mib` in the other process."""
        return self.ask("peak")

    def ask(self, request: str) -> Any:
        try:
            self.pipe.send((request, self.amp))
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise InputError("the process of transformers has ended; pass --no_peer to measure without it") from error


@contextmanager
def peer_runs(variant: str, make: Callable[..., Runs], flags: argparse.Namespace, *args: Any) -> Iterator[Runs]:
    """Yield the runs that `make(flags, *args)` returns in another process, which exists within the block.

    There are none with `--no_peer`, or if transformers is not installed or has no such variant.
    """
    if flags.no_peer or variant != "r50" or find_spec("transformers") is None:
        yield {}
        return
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make, flags, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield {amp: PeerRun(pipe, amp) for amp in flags.amp}
    finally:
        process.terminate()
        process.join()


def serve(pipe: Connection, make: Callable[..., Runs], flags: argparse.Namespace, *args: Any) -> None:
    """Run what the other process is asked for, until it is ended."""
    device = torch.device(flags.device)
    use_fast_kernels(device)  # TF32 for both
    runs = make(flags, *args)
    while True:
        request, amp = pipe.recv()
        if request == "peak":
            pipe.send(peak_mib(runs[amp], device))
        else:
            runs[amp]()
            synchronize(device)
            pipe.send(None)


def inference_of_peer(flags: argparse.Namespace) -> Runs:
    """Return forward passes of one image."""
    model = build_peer(flags.device).eval()
    image = random_images(1, flags.size, torch.device(flags.device)) / 255
    return {amp: inference(model, image, amp) for amp in flags.amp}


def training_of_peer(flags: argparse.Namespace, batch_size: int) -> Runs:
    """Return training steps on a batch."""
    return {amp: PeerStep(batch_size, amp, flags) for amp in flags.amp}


def build_peer(device: str) -> nn.Module:
    """Return the R50 model of `transformers`, doing the same work."""
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


class PeerStep:
    """The recipe's step on a batch of random images, with the model and losses of `transformers`."""

    def __init__(self, batch_size: int, amp: str, flags: argparse.Namespace) -> None:
        self.device = torch.device(flags.device)
        self.amp = amp
        self.model = build_peer(flags.device).train()
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
