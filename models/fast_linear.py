"""Faster linear layers for predictions on CPUs, by matrix products of oneDNN.

PyTorch computes products in float32 by MKL, which takes twice as long as oneDNN on AMD's CPUs with AVX-512. The plain
versions are `F.linear` and `nn.Linear`; nothing here is needed to understand the models.

Shapes: C features in, C' features out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modes import needs_only_values, onednn_supports
from models.not_scriptable import NotScriptable


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x wᵀ + b [.., C'] for x [.., C], w [C', C] and b [C'], like `F.linear`.

    In 16 bits, `F.linear` uses oneDNN itself.
    """
    if is_faster(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN's product, which has no gradients, can be used and is faster: in float32, for weights that
    are not transposed."""
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if {tensor.dtype for tensor in tensors} != {torch.float32} or torch.is_autocast_enabled("cpu"):
        return False
    return onednn_multiplies(*tensors) and weight.is_contiguous()


def onednn_multiplies(x: Tensor, *others: Tensor) -> bool:
    """Return whether oneDNN's product, which has no gradients, can be used for x and weights."""
    has_rows = x.dim() > 1 and x.numel() > 0
    return has_rows and needs_only_values(x, *others) and onednn_supports(x, *others)


class FastLinear(NotScriptable, nn.Linear):
    """Linear layer that uses `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., C'] for x [.., C]."""
        return linear(x, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Change the class of all linear layers of a model to `FastLinear`; their weights stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
