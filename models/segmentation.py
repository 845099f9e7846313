"""DETR's mask head on top of a detector: attention maps of the queries, and convolutions that turn them into masks.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 4.4 and figure 8.

Every operation of the head is per query, so masks are computed only for chosen queries: in training, those matched with
a target; at inference, those that are kept. Tensors that all queries of an image share are computed once.

Shapes: B images, padded to H×W, N_b chosen queries of image b, M chosen queries of all images, h heads, C width,
S = H'·W' cells of the last feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detector import Detector, Embeddings
from models.matcher import copy_to_device
from models.not_scriptable import NotScriptable
from models.prepared import prepare
from util.nested_tensor import NestedTensor
from util.precision import at_least_float32

GROUPS = 8  # of the group norms


class AttentionMaps(nn.Module):
    """Attention of queries to the image, without values: where each head looks for each query."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def keys(self, memory: Tensor) -> Tensor:
        """Return the keys [B, h, C / h, S] of the encoder's output [B, S, C]."""
        return self.k_linear(memory).unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1)

    def forward(self, queries: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """Return the maps [.., N, h, S] of queries [.., N, C], with the keys [.., h, C / h, S] of their image.

        The softmax is over heads and cells together, as in all published weights. padding: [.., S], True on padding.
        """
        q = self.q_linear(queries).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # [.., h, N, C / h]
        logits = ((q * q.shape[-1] ** -0.5) @ keys).transpose(-3, -2)  # [.., N, h, S]
        logits = logits.masked_fill(padding[..., None, None, :], -math.inf)
        return logits.flatten(-2).softmax(-1).view_as(logits)


class MaskHead(nn.Module):
    """Convolutions from attention maps and features to mask logits, at the resolution of the first stage.

    Args:
        dim: the width C of the transformer.
        num_heads: h.
        stage_channels: the channels of layer3, layer2 and layer1, which are added after each upsampling.
    """

    def __init__(self, dim: int, num_heads: int, stage_channels: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.lay1, self.gn1 = conv_and_norm(dim + num_heads, dim + num_heads)
        self.lay2, self.gn2 = conv_and_norm(dim + num_heads, dim // 2)
        self.lay3, self.gn3 = conv_and_norm(dim // 2, dim // 4)
        self.lay4, self.gn4 = conv_and_norm(dim // 4, dim // 8)
        self.lay5, self.gn5 = conv_and_norm(dim // 8, dim // 16)
        self.out_lay = nn.Conv2d(dim // 16, 1, kernel_size=3, padding=1)
        self.adapter1 = nn.Conv2d(stage_channels[0], dim // 2, kernel_size=1)
        self.adapter2 = nn.Conv2d(stage_channels[1], dim // 4, kernel_size=1)
        self.adapter3 = nn.Conv2d(stage_channels[2], dim // 8, kernel_size=1)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, a=1)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def shared(self, features: Tensor, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that all queries of an image share, [B, channels, rows, columns] each.

        They are the part of the first convolution over the features [B, C, H', W'], and the adapted stages, given as
        layer3, layer2 and layer1.
        """
        weight = self.lay1.weight[:, : self.dim]
        adapters = self.adapter1, self.adapter2, self.adapter3
        return [
            F.conv2d(features, weight, self.lay1.bias, padding=1),
            *(adapter(stage) for adapter, stage in zip(adapters, stages, strict=True)),
        ]

    def forward(self, maps: Tensor, shared: Sequence[Tensor], image: Tensor) -> Tensor:
        """Return mask logits [M, H / 4, W / 4] for attention maps [M, h, H', W'] and the image [M] of each query.

        shared: the result of `shared`.
        """
        features, *stages = shared
        x = F.conv2d(maps, self.lay1.weight[:, self.dim :], padding=1) + features[image]
        x = F.relu(self.gn1(x), inplace=True)
        x = F.relu(self.gn2(self.lay2(x)), inplace=True)
        for stage, conv, norm in zip(
            stages, (self.lay3, self.lay4, self.lay5), (self.gn3, self.gn4, self.gn5), strict=True
        ):
            x = F.interpolate(x, size=stage.shape[-2:], mode="nearest") + stage[image]
            x = F.relu(norm(conv(x)), inplace=True)
        return self.out_lay(x)[:, 0]


def conv_and_norm(inputs: int, outputs: int) -> tuple[nn.Conv2d, nn.GroupNorm]:
    """Return a 3×3 convolution and the norm of its output."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.GroupNorm(math.gcd(GROUPS, outputs), outputs)


class QueryMasks:
    """Masks of a batch, computed for chosen queries.

    Args:
        model: the model with the mask head.
        embeddings: the embeddings of the batch.
    """

    def __init__(self, model: DETRsegm, embeddings: Embeddings) -> None:
        self.model = model
        self.embeddings = embeddings
        kind = embeddings.hs.device.type
        self.precision = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None

    def of(self, queries: Sequence[Tensor]) -> Tensor:
        """Return mask logits [M, H / 4, W / 4] of chosen queries, given as indices [N_b] for each of the B images.

        They are computed in the precision of the forward pass and returned in at least float32.
        """
        image = torch.arange(len(queries)).repeat_interleave(torch.tensor([len(chosen) for chosen in queries]))
        hs, keys, padding = self.embeddings.hs[-1], self.shared[0], self.padding
        with self.autocast():
            maps = [self.model.bbox_attention(hs[b, chosen], keys[b], padding[b]) for b, chosen in enumerate(queries)]
        return self.masks(torch.cat(maps), copy_to_device(image, hs.device))

    def of_image(self, image: int, queries: Tensor) -> Tensor:
        """Return the mask logits [N, H / 4, W / 4] of N queries of one image."""
        none = queries[:0]
        return self.of([queries if i == image else none for i in range(self.embeddings.hs.shape[1])])

    def all(self) -> Tensor:
        """Return the mask logits of all queries, [B, Q, H / 4, W / 4]."""
        hs = self.embeddings.hs[-1]
        with self.autocast():
            maps = self.model.bbox_attention(hs, self.shared[0], self.padding)  # [B, Q, h, S]
        image = torch.arange(hs.shape[0], device=hs.device)[:, None].expand(hs.shape[:2])
        return self.masks(maps.flatten(0, 1), image.flatten()).unflatten(0, hs.shape[:2])

    def masks(self, maps: Tensor, image: Tensor) -> Tensor:
        """Return mask logits [M, H / 4, W / 4] for attention maps [M, h, S] and the image [M] of each query."""
        x = maps.unflatten(-1, self.embeddings.features.shape[-2:])  # [M, h, H', W']
        with self.autocast():
            return at_least_float32(self.model.mask_head(x, self.shared[1:], image))

    def all_tensors(self) -> list[Tensor]:
        """Return tensors that depend on all weights of the head: the masks of all queries."""
        return [self.all()]

    @cached_property
    def shared(self) -> list[Tensor]:
        """Tensors that all queries of an image share: the keys, and the result of `MaskHead.shared`."""
        *lower, _ = (stage.tensors for stage in self.embeddings.stages)  # of layer1, layer2 and layer3
        with self.autocast():
            keys = self.model.bbox_attention.keys(self.embeddings.memory)  # [B, h, C / h, S]
            return [keys, *self.model.mask_head.shared(self.embeddings.features, lower[::-1])]

    @property
    def padding(self) -> Tensor:
        """Mask of the last feature map, [B, S], True on padding."""
        return self.embeddings.stages[-1].mask.flatten(1)

    def autocast(self) -> AbstractContextManager:
        """Return a context with the precision of the forward pass."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.embeddings.hs.device.type, self.precision)


class DETRsegm(NotScriptable, nn.Module):
    """A detector with the mask head.

    Args:
        detr: the detector, whose backbone returns the features of all stages.
        num_heads: h.
        freeze_detr: train only the head; the detector stays in evaluation mode, without dropout.
        all_masks: return the masks of all queries.
    """

    def __init__(self, detr: Detector, num_heads: int, freeze_detr: bool = False, all_masks: bool = False) -> None:
        super().__init__()
        self.detr = detr
        self.freeze_detr = freeze_detr
        self.all_masks = all_masks
        dim, last = detr.input_proj.out_channels, detr.backbone.num_channels
        self.bbox_attention = AttentionMaps(dim, num_heads)
        self.mask_head = MaskHead(dim, num_heads, [last // 2, last // 4, last // 8])
        if freeze_detr:
            self.detr.requires_grad_(False)
        self.train(self.training)

    def prepared(self) -> DETRsegm:
        """Return a copy for predictions, like `Detector.prepared`."""
        return prepare(self)

    @property
    def detector(self) -> Detector:
        """The detector under the mask head."""
        return self.detr

    def train(self, mode: bool = True) -> DETRsegm:
        """Set the mode of the head, and that of the detector unless it is frozen."""
        super().train(mode)
        if self.freeze_detr:
            self.detr.eval()
        return self

    def forward(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> dict:
        """Return the detector's outputs and `masks`, from which `QueryMasks.of` computes those of chosen queries.

        With `all_masks`, return `pred_masks` instead: the mask logits of all queries, [B, Q, H / 4, W / 4].
        """
        embeddings = self.detr.embed(samples)
        masks = QueryMasks(self, embeddings)
        return self.detr.outputs(embeddings) | ({"pred_masks": masks.all()} if self.all_masks else {"masks": masks})
