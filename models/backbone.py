"""The ResNet that turns images into a feature map, and the positions of its cells.

Shapes: B images H×W, feature map H'×W' (1/32 of the image; 1/16 with dilation), C' channels.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from models.frozen_norm import FoldedBasicBlock, FoldedBody, FoldedBottleneck, channels_last, fold_norms
from util.errors import InputError
from util.nested_tensor import NestedTensor

CHANNELS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
# The norm, and the blocks of shallow and of deep networks.
KINDS = {
    "frozen": (FrozenBatchNorm2d, FoldedBasicBlock, FoldedBottleneck),
    "batch": (nn.BatchNorm2d, BasicBlock, Bottleneck),
}


class Backbone(nn.Module):
    """A torchvision ResNet without its classifier.

    Args:
        name: a key of `CHANNELS`.
        dilation: replace the stride of the last stage by dilation (DC5): twice the resolution.
        norm: "frozen" keeps the batch norms as buffers, "batch" trains them.
        train: which part learns: "none", "late" (layer2 to layer4, for pretrained weights) or "all".

    Raises:
        InputError: for a name that is not known, or one that torchvision cannot dilate.
    """

    def __init__(self, name: str, dilation: bool = False, norm: str = "frozen", train: str = "late") -> None:
        super().__init__()
        if name not in CHANNELS:
            raise InputError(f"--backbone {name}: choose one of {', '.join(CHANNELS)}")
        if dilation and CHANNELS[name] == 512:
            raise InputError(f"--dilation does not work with --backbone {name}: choose resnet50 or resnet101")
        if norm not in KINDS:
            raise InputError(f"--backbone_norm {norm}: choose one of {', '.join(KINDS)}")
        norm_layer, basic_block, bottleneck = KINDS[norm]
        resnet = ResNet(
            basic_block if CHANNELS[name] == 512 else bottleneck,
            DEPTHS[name],
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=norm_layer,
        )
        if norm == "frozen":
            fold_norms(resnet)
        # ReLU comes after the pooling, which gives the same from a quarter of the values.
        order = ("conv1", "bn1", "maxpool", "relu", "layer1", "layer2", "layer3", "layer4")
        stages = [(key, getattr(resnet, key)) for key in order]
        body = FoldedBody if norm == "frozen" else nn.Sequential
        self.body = body(OrderedDict(stages))
        self.num_channels = CHANNELS[name]
        learns = {"none": (), "late": ("layer2", "layer3", "layer4"), "all": tuple(key for key, _ in stages)}[train]
        for key, module in stages:
            module.requires_grad_(key in learns)

    def forward(self, images: Tensor, padding: Tensor) -> dict[str, NestedTensor]:
        """Return features [B, C', H', W'] and their mask [B, H', W'] of images [B, 3, H, W] and their mask [B, H, W].

        They come under the name "0", as in the published code, whose users read them by hooks.
        """
        # With trained norms and channels last, the gradients of plain 1×1 convolutions would come in strides that
        # DistributedDataParallel warns about.
        images = channels_last(images) if isinstance(self.body, FoldedBody) else images.contiguous()
        features = self.body(images)
        padding = F.interpolate(padding[:, None].float(), size=features.shape[-2:], mode="nearest")
        return {"0": NestedTensor(features, padding[:, 0].bool())}


class BackboneWithPosition(nn.Sequential):
    """Backbone and position embedding; a Sequential for the published keys `backbone.0.*` and `backbone.1.*`."""

    def __init__(self, backbone: Backbone, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B, C', H', W'], their mask [B, H', W'], and positions [B, H', W', C]."""
        features, padding = self[0](images, padding)["0"].decompose()
        return features, padding, self[1](padding)
