"""Dropout, with cheaper random numbers on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.not_scriptable import NotScriptable


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements with probability p, 0 ≤ p < 1, and scale the others by 1 / (1 - p).

    On CPUs, PyTorch draws 64 random bits per element, which takes as long as the attention around it; 16 bits suffice,
    and p is rounded down to a multiple of 2⁻¹⁶. Compiled code draws its own numbers.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = int(p * 2**16)  # of the 2¹⁶ equally likely values
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty(x.shape, dtype=x.dtype)  # 1 or 0, computed without a tensor of bools
    torch.ge(draws[: x.numel()].view(x.shape), dropped - 2**15, out=kept)
    return x * kept.mul_(2**16 / (2**16 - dropped))


class Dropout(NotScriptable, nn.Dropout):
    """Layer that applies `dropout` in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x."""
        return dropout(x, self.p) if self.training and self.p > 0 else x
