"""Common part of all detectors: images in, class logits and boxes of a fixed number of queries out.

Shapes: B images H×W, feature map H'×W', S = H'·W', Q queries, C width, K logits, L decoder layers.

With G groups of queries (Group DETR), Q counts those of all groups in training, and those of the first group otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.backbone import Joiner
from models.fast_linear import use_fast_linear
from models.inputs import as_batch
from models.not_scriptable import NotScriptable
from models.prepared import prepare
from models.transformer import MLP, Transformer
from util.nested_tensor import NestedTensor
from util.precision import at_least_float32, without_autocast

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Embeddings(NamedTuple):
    """Embeddings of a batch: the inputs of the heads for classes and boxes, and of further heads.

    stages: features of the backbone's stages with their masks, the last stage last (see `Backbone`).
    features: [B, C, H', W'], the last stage projected to the transformer's width.
    memory: [B, S, C], the output of the encoder.
    hs: [L, B, Q, C], the outputs of the decoder layers.
    reference: [Q, 2], the reference points of the queries, or None for a decoder without them.
    """

    stages: list[NestedTensor]
    features: Tensor
    memory: Tensor
    hs: Tensor
    reference: Tensor | None


class Detector(NotScriptable, nn.Module):
    """Backbone, transformer, and heads for classes and boxes; models differ in the decoder, the boxes and the queries.

    Args:
        backbone: maps images to feature maps and positions.
        transformer: maps a feature map and queries to decoder outputs.
        dim: the width C of the transformer.
        num_logits: K, per query.
        num_queries: the maximum number of objects that can be found in an image.
        aux_loss: also return the predictions of the decoder layers before the last one.
        num_groups: G; each group has `num_queries` queries.
    """

    def __init__(
        self,
        backbone: Joiner,
        transformer: Transformer,
        dim: int,
        num_logits: int,
        num_queries: int,
        aux_loss: bool = False,
        num_groups: int = 1,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_logits)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(num_groups * num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss
        self.num_groups = num_groups
        use_fast_linear(self)  # computes the same in less time

    def forward(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Return predictions for a NestedTensor, a list of [3, h, w] images of any sizes, or one [B, 3, H, W] tensor.

        Images are uint8, or float and normalised by ImageNet's mean and deviation.

        Return a dict of `pred_logits` [B, Q, K], `pred_boxes` [B, Q, 4] as cxcywh relative to the unpadded image, and,
        with `aux_loss`, `aux_outputs`: a list with the same two entries for every decoder layer before the last one.

        Raise TypeError or ValueError for anything other than such samples (`as_batch`).
        """
        return self.outputs(self.embed(samples))

    def embed(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> Embeddings:
        """Return the outputs of backbone, encoder and decoder for images, given as to `forward`."""
        samples = as_batch(samples)
        images, mask = samples.decompose()
        if images.dtype == torch.uint8:
            images = self.normalize(images, mask if samples.has_padding else None)

        stages, positions = self.backbone(NestedTensor(images, mask, samples.has_padding))
        x, mask = stages[-1].decompose()  # [B, C', H', W'], [B, H', W']
        features = self.input_proj(x)  # [B, C, H', W']
        query_pos = self.query_embed.weight  # [Q, C]
        if self.num_groups > 1 and not self.training:
            query_pos = query_pos[: len(query_pos) // self.num_groups]
        position = positions[-1].flatten(2).transpose(1, 2).to(query_pos.dtype)  # [B, S, C]
        padding = mask.flatten(1) if samples.has_padding else None  # [B, S]
        hs, reference, memory = self.transformer(features.flatten(2).transpose(1, 2), position, padding, query_pos)
        return Embeddings(stages, features, memory, hs, reference)

    def outputs(self, embeddings: Embeddings) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Return the result of `forward` from the embeddings of a batch."""
        hs = embeddings.hs
        with without_autocast(hs.device):  # predictions keep at least float32
            hs = hs.to(self.query_embed.weight.dtype)
            logits = at_least_float32(self.class_embed(hs))  # [L, B, Q, K]
            boxes = self.boxes(hs, embeddings.reference)  # [L, B, Q, 4]
        layers = [{"pred_logits": layer[0], "pred_boxes": layer[1]} for layer in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]} if self.aux_loss else layers[-1]

    def prepared(self) -> Detector:
        """Return a copy that predicts faster on CPUs and does not follow later changes of the weights.

        On other devices, return this model (`models.prepared.prepare`).
        """
        return prepare(self)

    @property
    def detector(self) -> Detector:
        """This model; for a model with masks, the detector under its head."""
        return self

    def boxes(self, hs: Tensor, reference: Tensor | None) -> Tensor:
        """Return boxes [L, B, Q, 4] for decoder outputs [L, B, Q, C] and reference points [Q, 2] or None."""
        raise NotImplementedError

    @property
    def pixel_mean(self) -> Tensor:
        """Mean of ImageNet [3, 1, 1], on the weights' device and in their precision."""
        return self.per_channel(IMAGENET_MEAN)

    @property
    def pixel_std(self) -> Tensor:
        """Standard deviation of ImageNet [3, 1, 1], on the weights' device and in their precision."""
        return self.per_channel(IMAGENET_STD)

    def per_channel(self, values: Sequence[float]) -> Tensor:
        """Return three constants as [3, 1, 1].

        They are created at each call, since no state dict would restore them after `to_empty`, and filled on the
        device, since the host would wait for a copy.
        """
        return torch.stack([self.query_embed.weight.new_full((1, 1), value) for value in values])

    def normalize(self, images: Tensor, padding: Tensor | None) -> Tensor:
        """Return uint8 images [B, 3, H, W] as normalised floats, 0 where `padding` [B, H, W], if given, is True."""
        mean, std = self.pixel_mean, self.pixel_std
        images = images.to(mean.dtype).div_(255).sub_(mean).div_(std)
        return images if padding is None else images.masked_fill_(padding[:, None], 0)
