"""Timing of runs that are compared on machines whose speed varies."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def alternate(runs: Mapping[Name, Callable[[], Any]], device: torch.device, repeats: int) -> dict[Name, float]:
    """Return the median seconds of each run; the runs take turns, after two rounds that are not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for turn in range(-2, repeats):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Return the peak GPU memory in MiB that a run adds to the memory allocated before it; None on CPUs."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20)
