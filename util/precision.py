"""Precision: parts of a model that stay in float32 while the rest computes in 16 bits."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32; return other tensors unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which operators compute in the precision of their inputs."""
    kind = device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)  # "meta" has no autocast
