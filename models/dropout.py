"""Dropout, with cheaper random numbers on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.not_scriptable import NotScriptable

VALUES = 2**16  # equally likely random numbers


def dropout(x: Tensor, p: float, kept: Tensor | None = None) -> Tensor:
    """Zero elements with probability p, 0 ≤ p < 1, and scale the others by 1 / (1 - p).

    On CPUs, PyTorch draws 64 random bits per element, which takes as long as the attention around it; 16 bits suffice,
    and p is rounded down to a multiple of 2⁻¹⁶. Compiled code draws its own numbers.

    Args:
        kept: on CPUs, a result of `draw_kept` for the shape of x; None: draw it.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    factors = draw_kept(x.shape, p, x.dtype) if kept is None else kept.to(x.dtype, copy=True)
    return x * factors.mul_(VALUES / (VALUES - dropped_values(p)))


def draw_kept(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU that is 0 with probability p and otherwise 1."""
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty(shape, dtype=dtype)  # computed without a tensor of bools
    return torch.ge(draws[: shape.numel()].view(shape), dropped_values(p) - VALUES // 2, out=kept)


def dropped_values(p: float) -> int:
    """Return how many of the random values mean that an element is dropped."""
    return int(p * VALUES)


class Dropout(NotScriptable, nn.Dropout):
    """Layer that applies `dropout` in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x."""
        return dropout(x, self.p) if self.training and self.p > 0 else x
