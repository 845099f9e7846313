"""Backbone: a ResNet that turns images into feature maps, and the positions of their cells.

Shapes: B images H×W, feature map H'×W' of the last stage (1/32 of the image; 1/16 with dilation), C' channels.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from models.folded_norms import channels_last, fold_norms
from models.not_scriptable import NotScriptable
from util.errors import InputError
from util.nested_tensor import NestedTensor

CHANNELS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}  # of the last stage
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
NORMS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Body(NotScriptable, nn.Sequential):
    """A ResNet up to its last stage."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each of `STAGES`, [B, channels, rows, columns], for images [B, 3, H, W]."""
        x, features = images, {}
        for name, module in self.named_children():
            x = module(x)
            if name in STAGES:
                features[name] = x
        return features


class Backbone(NotScriptable, nn.Module):
    """A torchvision ResNet without its classifier.

    Args:
        name: a key of `CHANNELS`.
        train_backbone: train layer2 to layer4, which suits pretrained weights.
        return_interm_layers: return the features of all stages, not only of the last one.
        dilation: replace the stride of the last stage by dilation (DC5): twice the resolution.
        norm: "frozen" keeps the batch norms as buffers, "batch" trains them.
        train_stem: also train the layers before layer2, which is necessary with random weights.

    Raises:
        InputError: if the name or the norm is unknown, or torchvision cannot dilate this network.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool = True,
        return_interm_layers: bool = False,
        dilation: bool = False,
        norm: str = "frozen",
        train_stem: bool = False,
    ) -> None:
        super().__init__()
        if name not in CHANNELS:
            raise InputError(f"--backbone {name}: choose one of {', '.join(CHANNELS)}")
        if dilation and CHANNELS[name] == 512:
            raise InputError(f"--dilation does not work with --backbone {name}: choose resnet50 or resnet101")
        if norm not in NORMS:
            raise InputError(f"--backbone_norm {norm}: choose one of {', '.join(NORMS)}")
        resnet = ResNet(
            BasicBlock if CHANNELS[name] == 512 else Bottleneck,
            DEPTHS[name],
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=NORMS[norm],
        )
        # ReLU comes after the pooling: the result is the same, but only a quarter of the values is left to compute.
        order = ("conv1", "bn1", "maxpool", "relu", *STAGES)
        self.body = Body(OrderedDict((key, getattr(resnet, key)) for key in order))
        self.num_channels = CHANNELS[name]
        self.stages = STAGES if return_interm_layers else STAGES[-1:]
        self.folded = norm == "frozen"
        for key, module in self.body.named_children():
            module.requires_grad_(train_backbone and (train_stem or key in STAGES[1:]))
        if self.folded:
            fold_norms(self.body)  # computes the same in less time

    def forward(self, tensor_list: NestedTensor) -> dict[str, NestedTensor]:
        """Return the features of the last stage [B, C', H', W'] as "0", or of all stages as "0" to "3", with masks."""
        images, padding = tensor_list.decompose()
        # With trained norms and channels last, the gradients of 1×1 convolutions would have strides that
        # DistributedDataParallel warns about.
        images = channels_last(images) if self.folded else images.contiguous()
        features = self.body(images)
        chosen = (features[stage] for stage in self.stages)
        return {str(i): NestedTensor(x, resized(padding, x), tensor_list.has_padding) for i, x in enumerate(chosen)}


def resized(padding: Tensor, features: Tensor) -> Tensor:
    """Return a mask [B, H, W] resized to [B, H', W'], the size of features [B, .., H', W']."""
    return F.interpolate(padding[:, None].float(), size=features.shape[-2:], mode="nearest")[:, 0].bool()


class Joiner(NotScriptable, nn.Sequential):
    """Backbone and position embedding; a Sequential for the published keys `backbone.0.*` and `backbone.1.*`."""

    def __init__(self, backbone: Backbone, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return the features of the backbone's stages and the positions [B, C, H', W'] of their cells."""
        features = list(self[0](tensor_list).values())
        return features, [self[1](stage) for stage in features]
