"""Residual blocks whose batch norms have fixed statistics, which are folded into the convolutions before them.

Shapes: B images, H×W feature map, C channels in, C' channels out, k×k kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """Keeps a frozen norm's buffers under their names; the `FoldedConv2d` before it has applied them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv2d(nn.Module):
    """A convolution without bias and the frozen norm behind it in one: norm(w * x) = (scale · w) * x + shift.

    That spares two passes over every activation. A weight w that is being trained is folded at every call, so that
    gradients reach it. Any other is folded once and kept, as scale and shift always are, outside the state dict, until
    a tensor that they come from changes. Only changes through `.data`, which are not counted, need a call of `train()`
    or `eval()` to be noticed. Where no gradient is needed, CPUs join sum and ReLU to the convolution.

    Args:
        conv: its weight becomes this module's.
        norm: stays a module of its own, which this one refers to.
    """

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__()
        self.weight = conv.weight  # [C', C, k, k]
        self.geometry = conv.stride, conv.padding, conv.dilation
        self.norm = (norm,)  # in a tuple, since it is not to be a submodule
        self.kept = {}  # by name: the origin of what is kept, itself, and the sources, whose ids stay theirs

    def forward(self, x: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """norm(w * x), plus `added`, through ReLU: [B, C, H, W] to [B, C', H', W'], the shape of `added`."""
        x = x.to(compute_dtype(x))
        if needs_gradient(self.weight) or is_captured():
            weight, bias = self.fold()
        else:
            weight, bias = self.fold_once(x.dtype)
            if has_fused_convolution(x) and not needs_gradient(x, added):
                return fused_convolution(x, weight, bias, self.geometry, added, relu)
        y = F.conv2d(x, weight, bias, *self.geometry)
        if added is not None:
            y += added
        return F.relu(y, inplace=True) if relu else y

    def fold(self) -> tuple[Tensor, Tensor]:
        """The weight [C', C, k, k], in the memory format of the activations, and the bias [C']."""
        scale, shift = self.norm_terms()
        weight = (self.weight.flatten(1) * scale).view_as(self.weight)
        return weight.contiguous(memory_format=torch.channels_last), shift

    def fold_once(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `fold`, in `dtype`, computed once."""
        sources = self.weight, *self.norm_terms()
        return self.keep("folded", lambda: tuple(tensor.to(dtype) for tensor in self.fold()), sources, dtype)

    def norm_terms(self) -> tuple[Tensor, Tensor]:
        """The scale [C', 1] and the shift [C'], computed once."""
        (norm,) = self.norm

        def compute() -> tuple[Tensor, Tensor]:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            return scale[:, None], norm.bias - norm.running_mean * scale

        return self.keep("terms", compute, (norm.weight, norm.bias, norm.running_mean, norm.running_var))

    def keep(
        self,
        name: str,
        compute: Callable[[], tuple[Tensor, Tensor]],
        sources: tuple[Tensor, ...],
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `compute` returns, from memory where `sources` and `dtype` are those of the last call with this name."""
        if is_captured():
            return compute()
        counted = not any(source.is_inference() for source in sources)  # else their changes are not
        origin = dtype, [(id(source), source._version) for source in sources if counted]
        if not counted or name not in self.kept or self.kept[name][0] != origin:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may meet gradients later
                self.kept[name] = origin, compute(), sources
        return self.kept[name][1]

    def train(self, mode: bool = True) -> FoldedConv2d:
        self.kept.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv2d:
        self.kept.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"kept": {}}  # neither copied nor pickled


class FoldedBasicBlock(BasicBlock):
    """ResNet-18's and 34's block; its norms are folded, and ReLU and sum are left to the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x, relu=True), added=shortcut, relu=True)


class FoldedBottleneck(Bottleneck):
    """The same of deeper networks."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(y, added=shortcut, relu=True)


def is_captured() -> bool:
    """Whether the operators are being recorded, by torch.compile or for ONNX, rather than computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision that a convolution of `x` is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def has_fused_convolution(x: Tensor) -> bool:
    """Whether oneDNN, which computes PyTorch's convolutions on CPUs, can take `x`."""
    if x.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple, added: Tensor | None, relu: bool
) -> Tensor:
    """A convolution, sum and ReLU in one pass, without gradients: the operators that `torch.compile` uses on CPUs."""
    stride, padding, dilation = geometry
    inputs = weight, bias, padding, stride, dilation, 1
    operator, activation = torch.ops.mkldnn._convolution_pointwise, "relu" if relu else "none"
    if added is None:
        return operator(x, *inputs, activation, [], "")
    return operator.binary(x, added, *inputs, "add", 1.0, activation if relu else None, [], "")


def fold_norms(network: nn.Module) -> None:
    """Replaces every convolution that has a `FoldedNorm` for its next sibling by one with the norm folded in."""
    for module in list(network.modules()):
        for (name, conv), (_, norm) in pairwise(list(module.named_children())):
            if isinstance(norm, FoldedNorm):
                setattr(module, name, FoldedConv2d(conv, norm))
