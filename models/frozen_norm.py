"""Batch norms with fixed statistics, folded into the convolutions before them.

Shapes: C channels in, C' channels out, k×k kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """Keeps a frozen norm's buffers under their names; the `FoldedConv2d` before it has applied them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv2d(nn.Module):
    """A convolution without bias and the frozen norm behind it in one: norm(w * x) = (scale · w) * x + shift.

    That spares two passes over every activation. While gradients are recorded, the weights are folded at every call, so
    that gradients reach w. Without gradients they are folded once and kept, outside the state dict, until a tensor that
    they come from changes. Only changes through `.data`, which are not counted, need a call of `eval()` to be noticed.

    Args:
        conv: its weight becomes this module's.
        norm: stays a module of its own, which this one refers to.
    """

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__()
        self.weight = conv.weight  # [C', C, k, k]
        self.geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.norm = (norm,)  # in a tuple, since it is not to be a submodule
        self.kept = None  # folded weight and bias, what they come from, and the sources, whose ids stay theirs

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.kept = None  # gradients are followed by a step of the optimizer
            weight, bias = self.fold()
        else:
            weight, bias = self.fold_once()
        return F.conv2d(x, weight, bias, **self.geometry)

    def fold(self) -> tuple[Tensor, Tensor]:
        """The weight [C', C, k, k], in the memory format of the activations, and the bias [C']."""
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = (self.weight.flatten(1) * scale[:, None]).view_as(self.weight)
        return weight.contiguous(memory_format=torch.channels_last), norm.bias - norm.running_mean * scale

    def fold_once(self) -> tuple[Tensor, Tensor]:
        """As `fold`, from memory where weight and norm are still those of the last call."""
        (norm,) = self.norm
        sources = (self.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if any(source.is_inference() for source in sources):  # their changes are not counted
            return self.fold()
        versions = [(id(source), source._version) for source in sources]
        kept = self.kept
        if kept is None or kept[0] != versions:
            kept = self.kept = versions, self.fold(), sources
        return kept[1]

    def train(self, mode: bool = True) -> FoldedConv2d:
        self.kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv2d:
        self.kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"kept": None}  # neither copied nor pickled


def fold_norms(network: nn.Module) -> None:
    """Replaces every convolution that has a `FoldedNorm` for its next sibling by one with the norm folded in."""
    for module in list(network.modules()):
        for (name, conv), (_, norm) in pairwise(list(module.named_children())):
            if isinstance(norm, FoldedNorm):
                setattr(module, name, FoldedConv2d(conv, norm))
