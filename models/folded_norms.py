"""Faster computation of a ResNet with frozen batch norms: each is folded into the convolution before it.

`fold_norms` replaces the classes of the modules in a ResNet's body by those below, which compute the same. Nothing here
is needed to understand the model.

Shapes: B images, H×W feature map, C channels in, C' channels out, k×k kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from models.fused_convolution import can_fuse, fused_convolution
from models.modes import has_hooks, is_transformed
from models.not_scriptable import NotScriptable

Terms = dict[nn.Module, tuple[Tensor, Tensor]]  # scale [C', 1] and shift [C'] of each norm


def norm_terms(network: nn.Module, dtype: torch.dtype) -> Terms:
    """Return the scale and the shift of each frozen norm of a network: norm(y) = scale · y + shift.

    All are computed and converted at once, since a GPU would have to wait while the host launches six tiny operators
    for each of 50 norms.

    Args:
        dtype: of the shifts, the precision in which the convolutions are computed.
    """
    norms = [module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)]
    names = "weight", "bias", "running_mean", "running_var"
    weight, bias, mean, variance = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
    scale = weight * (variance + norms[0].eps).rsqrt()
    shift = (bias - mean * scale).to(dtype)
    terms, start = {}, 0
    for norm in norms:  # slices: ONNX Runtime fails to load files in which one `split` has an output per norm
        part = slice(start, start + len(norm.weight))
        terms[norm] = scale[part, None], shift[part]
        start = part.stop
    return terms


class FoldedConv2d(NotScriptable, nn.Conv2d):
    """Convolution without bias that also applies the frozen norm after it: norm(w * x) = (scale · w) * x + shift.

    This saves two passes over every activation. Nothing is kept between calls, since a weight can change unnoticed, for
    example through `.data`; folding all of R50 takes 1 to 3 % of the time of a forward pass on an 800×1066 image. If
    called with only an input, the module is a plain convolution.
    """

    def forward(
        self,
        x: Tensor,
        terms: tuple[Tensor, Tensor] | None = None,
        added: Tensor | None = None,
        relu: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        """Return norm(w * x), plus `added`, through ReLU: [B, C, H, W] to [B, C', H', W'], the shape of `added`.

        With `overwrite`, the result may be written over `added`.
        """
        if terms is None:
            return super().forward(x)
        x = x.to(compute_dtype(x))
        if can_fuse(x, added, self.weight, *terms):
            weight, bias = self.fused_weight(x, terms)
            return fused_convolution(self, x, weight, bias, added, relu, overwrite)
        weight, bias = self.fold(*terms)
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        if added is not None:
            y += added
        return F.relu(y, inplace=True) if relu else y

    def fused_weight(self, x: Tensor, terms: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the folded weight and the bias for a fused convolution of x."""
        return self.fold(*terms)

    def fold(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the folded weight [C', C, k, k], in the memory format of the activations, and the bias [C']."""
        return channels_last((self.weight.flatten(1) * scale).view_as(self.weight)), shift


class FoldedBasicBlock(BasicBlock):
    """Block of ResNet-18 and 34."""

    def forward(self, x: Tensor, terms: Terms | None = None, overwrite: bool = False) -> Tensor:
        """Return [B, C', H', W'] from [B, C, H, W]; `terms` include those of this block's norms.

        With `overwrite`, the result may be written over `x`.
        """
        terms = terms or norm_terms(self, compute_dtype(x))
        shortcut, overwrite = shortcut_of(self, x, terms, overwrite)
        y = self.conv1(x, terms[self.bn1], relu=True)
        return self.conv2(y, terms[self.bn2], shortcut, relu=True, overwrite=overwrite)


class FoldedBottleneck(Bottleneck):
    """Block of ResNet-50 and 101."""

    def forward(self, x: Tensor, terms: Terms | None = None, overwrite: bool = False) -> Tensor:
        """Return [B, C', H', W'] from [B, C, H, W]; `terms` include those of this block's norms.

        With `overwrite`, the result may be written over `x`.
        """
        terms = terms or norm_terms(self, compute_dtype(x))
        shortcut, overwrite = shortcut_of(self, x, terms, overwrite)
        y = self.conv1(x, terms[self.bn1], relu=True)
        y = self.conv2(y, terms[self.bn2], relu=True)
        return self.conv3(y, terms[self.bn3], shortcut, relu=True, overwrite=overwrite)


def shortcut_of(block: BasicBlock | Bottleneck, x: Tensor, terms: Terms, overwrite: bool) -> tuple[Tensor, bool]:
    """Return the input of a block as it is added to its output, [B, C', H', W'], and whether it may be overwritten.

    Args:
        x: [B, C, H, W], the input.
        overwrite: whether `x` may be overwritten.
    """
    if block.downsample is None:
        return x, overwrite
    conv, norm = block.downsample
    return conv(x, terms[norm]), not has_hooks(conv)


class FoldedStage(nn.Sequential):
    """Blocks of one resolution."""

    def forward(self, x: Tensor, terms: Terms | None = None) -> Tensor:
        """Return [B, C', H', W'] from [B, C, H, W]."""
        terms = terms or norm_terms(self, compute_dtype(x))
        overwrite = x.device.type == "cpu" and not has_hooks(self)
        for i, block in enumerate(self):
            x = block(x, terms, overwrite and i > 0)  # the first input belongs to the caller
        return x


class FoldedBody(nn.Sequential):
    """A ResNet up to its last stage."""

    conv1: FoldedConv2d
    bn1: FrozenBatchNorm2d
    maxpool: nn.MaxPool2d
    relu: nn.ReLU

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each stage for images [B, 3, H, W]."""
        terms = self.norm_terms(compute_dtype(images))
        x = self.conv1(images, terms[self.bn1])
        x = self.relu(self.maxpool(x))
        features = {}
        for name, stage in self.named_children():
            if isinstance(stage, FoldedStage):
                features[name] = x = stage(x, terms)
        return features

    def norm_terms(self, dtype: torch.dtype) -> Terms:
        """Return the terms of all norms."""
        return norm_terms(self, dtype)


def fold_norms(body: nn.Sequential) -> None:
    """Change the modules of a `models.backbone.Body` to the classes above; their weights and settings stay."""
    folded = {nn.Conv2d: FoldedConv2d, BasicBlock: FoldedBasicBlock, Bottleneck: FoldedBottleneck}
    for module in body.modules():
        module.__class__ = folded.get(type(module), type(module))
    for stage in body.children():
        if isinstance(stage, nn.Sequential):
            stage.__class__ = FoldedStage
    body.__class__ = FoldedBody


def channels_last(x: Tensor) -> Tensor:
    """Return a tensor [B, C, H, W] with its channels last in memory, the format of the fastest convolutions."""
    # torch.func's transforms do not support memory formats.
    return x if is_transformed() else x.contiguous(memory_format=torch.channels_last)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a convolution of `x` is computed."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # an error for the meta device
    return torch.get_autocast_dtype(kind) if autocast else x.dtype
