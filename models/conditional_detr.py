"""Conditional DETR: images in, class logits and boxes of a fixed number of queries out.

Shapes: B images H×W, feature map H'×W', S = H'·W', Q queries, C width, K classes, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import BackboneWithPosition
from models.inputs import as_batch
from models.transformer import MLP, Transformer
from util.box_ops import inverse_sigmoid
from util.nested_tensor import NestedTensor
from util.precision import at_least_float32, without_autocast

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRIOR_PROBABILITY = 0.01  # of every class at the start of training (focal loss, section 3.3)


class ConditionalDETR(nn.Module):
    """Meng et al., ICCV 2021.

    Args:
        backbone: image to feature map and positions.
        transformer: feature map and queries to decoder outputs.
        dim: the width C of the transformer.
        num_classes: K; class ids are 0..K-1, there is no background class.
        num_queries: Q, the most objects that an image can be given.
        aux_loss: also return the predictions of the decoder layers before the last.
    """

    def __init__(
        self,
        backbone: BackboneWithPosition,
        transformer: Transformer,
        dim: int,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss
        nn.init.constant_(self.class_embed.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def forward(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Predictions for a NestedTensor, a list of [3, h, w] images of any sizes, or one [B, 3, H, W] tensor.

        Images are uint8, or float and normalised by ImageNet's mean and deviation.

        Returns a dict of `pred_logits` [B, Q, K], `pred_boxes` [B, Q, 4] as cxcywh relative to the unpadded image, and,
        with `aux_loss`, `aux_outputs`: the same two of every decoder layer before the last.

        Raises TypeError or ValueError for anything else than such samples (`as_batch`).
        """
        samples = as_batch(samples)
        images, padding = samples.decompose()
        if images.dtype == torch.uint8:
            images = self.normalize(images, padding)

        features, padding, position = self.backbone(images, padding)  # [B, C', H', W'], [B, H', W'], [B, H', W', C]
        x = self.input_proj(features).flatten(2).transpose(1, 2)  # [B, S, C]
        query_pos = self.query_embed.weight  # [Q, C]
        position = position.flatten(1, 2).to(query_pos.dtype)  # [B, S, C]
        padding = padding.flatten(1) if samples.has_padding else None  # [B, S]
        hs, reference = self.transformer(x, position, padding, query_pos)  # [L, B, Q, C], [Q, 2]

        with without_autocast(hs.device):  # predictions keep at least float32
            hs = hs.to(query_pos.dtype)
            logits = at_least_float32(self.class_embed(hs))  # [L, B, Q, K]
            offset = F.pad(inverse_sigmoid(reference), (0, 2))  # [Q, 4]: boxes are offsets from the reference points
            boxes = (self.bbox_embed(hs) + offset).sigmoid()  # [L, B, Q, 4]

        layers = [{"pred_logits": layer[0], "pred_boxes": layer[1]} for layer in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]} if self.aux_loss else layers[-1]

    @property
    def pixel_mean(self) -> Tensor:
        """ImageNet's mean [3, 1, 1], where the weights are and in their precision."""
        return self.per_channel(IMAGENET_MEAN)

    @property
    def pixel_std(self) -> Tensor:
        """ImageNet's standard deviation [3, 1, 1], likewise."""
        return self.per_channel(IMAGENET_STD)

    def per_channel(self, values: Sequence[float]) -> Tensor:
        """Return three constants as [3, 1, 1].

        Made at each call, since no state dict would restore them after `to_empty`; by filling, since a copy from the
        host would wait for the GPU.
        """
        return torch.stack([self.query_embed.weight.new_full((1, 1), value) for value in values])

    def normalize(self, images: Tensor, padding: Tensor) -> Tensor:
        """uint8 images to normalised floats, zero on padding."""
        mean, std = self.pixel_mean, self.pixel_std
        images = (images.to(mean.dtype) / 255 - mean) / std
        return images.masked_fill_(padding[:, None], 0)
