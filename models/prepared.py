"""A copy of a model for predictions on CPUs, whose weights are folded, converted and packed only once.

Otherwise, every forward pass folds the norms into the weights, converts the weights to the precision of the products,
and oneDNN packs them, that is, arranges them for its kernels. The copy computes the same values, and does not follow
later changes of the weights. Nothing here is needed to understand the models.

Shapes: C features or channels in, C' out, B images, H×W feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.attention import CrossAttention, PackedAttention, SelfAttention
from models.fast_linear import FastLinear, onednn_multiplies
from models.folded_norms import FoldedBody, FoldedConv2d, Terms, compute_dtype
from models.modes import has_hooks, needs_only_values

Model = TypeVar("Model", bound=nn.Module)


class Kept(dict[Hashable, Any]):
    """Results that a module computes once, by precision; copies and files of the module do not contain them."""

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class Prepared(nn.Module):
    """Base class of modules that keep packed weights."""

    kept: Kept

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x wᵀ + b [.., C'] for x [.., C], w [C', C] and b [C'], or None where oneDNN cannot compute it.

        Results for parameters, such as the object queries, are kept as well. A matrix may be a part of a parameter.
        """
        is_parameter = isinstance(x, nn.Parameter)
        x = x.to(compute_dtype(x))
        if not onednn_multiplies(x, weight):
            return None
        matrix, result = ((kind, x.dtype, weight.storage_offset()) for kind in ("matrix", "result"))
        if is_parameter and result in self.kept:
            return self.kept[result]
        if matrix not in self.kept:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(x.dtype).contiguous())
            self.kept[matrix] = packed, None if bias is None else bias.to(x.dtype)
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), *self.kept[matrix], "none", [], "")
        if is_parameter:
            self.kept[result] = y
        return y


class PreparedLinear(Prepared, FastLinear):
    """Linear layer with a packed matrix."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., C'] for x [.., C]."""
        y = self.product(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


class PreparedProjections(Prepared, PackedAttention):
    """Base class of attention whose projections have packed matrices."""

    def project(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the projection by some rows of the matrix, like `PackedAttention.project`."""
        y = self.product(x, weight, bias)
        return super().project(x, weight, bias) if y is None else y


class PreparedSelfAttention(PreparedProjections, SelfAttention):
    """Self-attention with packed matrices."""


class PreparedCrossAttention(PreparedProjections, CrossAttention):
    """Cross-attention with packed matrices."""


class PreparedConv2d(Prepared, FoldedConv2d):
    """Convolution with a folded weight, packed for the shape of the last input.

    Different shapes have different kernels; with a weight that is packed for another one, R50 can take twice the time.
    """

    def fused_weight(self, x: Tensor, terms: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the folded and packed weight and the bias for a fused convolution of x."""
        if x.dtype not in self.kept:
            self.kept[x.dtype] = [tensor.to(x.dtype) for tensor in self.fold(*terms)]
        weight, bias = self.kept[x.dtype]
        kind = x.dtype, x.shape
        packed_for, packed = self.kept.get("packed", (None, None))
        if packed_for != kind:
            settings = self.padding, self.stride, self.dilation, self.groups, list(x.shape)
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings)
            self.kept["packed"] = kind, packed
        return packed, bias


class PreparedBody(Prepared, FoldedBody):
    """A ResNet that computes the terms of its norms once."""

    def norm_terms(self, dtype: torch.dtype) -> Terms:
        """Return the terms of all norms, like `FoldedBody.norm_terms`."""
        if not needs_only_values(self.bn1.weight):
            return super().norm_terms(dtype)
        if dtype not in self.kept:
            self.kept[dtype] = super().norm_terms(dtype)
        return self.kept[dtype]


PREPARED: dict[type[nn.Module], type[Prepared]] = {
    nn.Linear: PreparedLinear,
    FastLinear: PreparedLinear,
    SelfAttention: PreparedSelfAttention,
    CrossAttention: PreparedCrossAttention,
    FoldedConv2d: PreparedConv2d,
    FoldedBody: PreparedBody,
}


def prepare(model: Model) -> Model:
    """Return a copy of a model for predictions, in evaluation mode, that keeps packed weights.

    Return the model itself where packed weights cannot be used: on GPUs, for models that are compiled or wrapped for
    several processes, and for models with hooks, which would be called with the modules of the copy.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.parameters())
    compiled = any(module._compiled_call_impl for module in model.modules())
    wrapped = isinstance(model, DistributedDataParallel)
    if not on_cpu or compiled or wrapped or has_hooks(model) or not torch.backends.mkldnn.is_available():
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if type(module) in PREPARED:
            module.__class__ = PREPARED[type(module)]
            vars(module)["kept"] = Kept()
    return model
