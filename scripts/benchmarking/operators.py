"""Count of the operators of a training step: what the host has to launch, which limits GPUs with few images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.benchmarking.model import PRECISIONS, TrainingStep, build


class OperatorCounter(TorchDispatchMode):
    """Within `with OperatorCounter() as counter`, counts operators except views and allocations, which do no work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_work = func.namespace == "aten" and not func.is_view and name != "_unsafe_view" and "empty" not in name
        self.count += is_work
        return func(*args, **(kwargs or {}))


def count_operators(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Count the operators of training steps, and those of their parts, by model, batch size and precision."""
    return [
        {"model": variant, "precision": PRECISIONS[amp], "batch": batch_size, **count_of_step(training)}
        for variant in flags.variants
        for batch_size in flags.batch_sizes
        for amp in flags.amp
        for training in [TrainingStep(*build(variant, torch.device(flags.device)), batch_size, amp, flags)]
    ]


def count_of_step(training: TrainingStep) -> dict[str, int]:
    """Return the number of operators of a training step, and of each of its parts."""
    training()  # the first step also creates the optimizer's moments
    counts = {}

    def counted(name: str, part: Callable[..., Any], *inputs: Any) -> Any:
        with OperatorCounter() as counter:
            result = part(*inputs)
        counts[name] = counter.count
        return result

    counted("operators", training)
    training.take_parts(counted)
    return counts
