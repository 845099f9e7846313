"""DETR: queries that sum content and position, and boxes predicted without reference points.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.

Shapes: B images, S = H·W cells of the feature map, Q queries, C width, L decoder layers; `visible` [B, 1, 1, S] is
False on padding, or None if there is none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossAttention, SelfAttention
from models.backbone import Joiner
from models.detector import Detector
from models.dropout import Dropout
from models.transformer import Encoder, Transformer, run_layer, share_initial_vectors


class DETRDecoderLayer(nn.Module):
    """Decoder layer: self-attention, cross-attention to the image, feed-forward network (appendix A.3)."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.multihead_attn = CrossAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, query_pos: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """Refine the decoder embeddings x [B, Q, C].

        query_pos: [Q, C], the object queries; memory and position: [B, S, C]; visible: as above.
        """
        x = self.norm1(x + self.dropout(self.self_attn(x, query_pos)[0]))
        x = self.norm2(x + self.dropout(self.multihead_attn(x, query_pos, memory, position, visible)[0]))
        ffn = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(ffn))


class DETRDecoder(nn.Module):
    """Decoder layers with a shared norm of their outputs.

    Args:
        num_layers: L.
        dim: the width C.
        num_heads, dim_feedforward, dropout: of each layer.
        checkpoint_activations: compute activations again in the backward pass instead of storing them.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.layers = nn.ModuleList(
            DETRDecoderLayer(dim, num_heads, dim_feedforward, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        share_initial_vectors(self.layers)

    def forward(
        self, query_pos: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, None]:
        """Return outputs [L, B, Q, C], and None for the reference points, which DETR does not have.

        query_pos: [Q, C]; memory and position: [B, S, C]; visible: as above.
        """
        x = memory.new_zeros(memory.shape[0], *query_pos.shape)
        outputs = []
        for layer in self.layers:
            x = run_layer(layer, self.checkpoint_activations, x, query_pos, memory, position, visible)
            outputs.append(self.norm(x))
        return torch.stack(outputs), None


class DETR(Detector):
    """Carion et al., ECCV 2020: one logit per class and one for "no object", and boxes without reference points."""

    def boxes(self, hs: Tensor, reference: Tensor | None) -> Tensor:
        """Return boxes [L, B, Q, 4] for decoder outputs [L, B, Q, C]."""
        return self.bbox_embed(hs).sigmoid()


def build_detr(
    backbone: Joiner,
    *,
    num_classes: int,
    num_queries: int,
    dim: int,
    num_heads: int,
    enc_layers: int,
    dec_layers: int,
    dim_feedforward: int,
    dropout: float,
    aux_loss: bool,
    checkpoint_activations: bool,
) -> DETR:
    """Return a randomly initialised model; class ids are 0 to `num_classes` - 1, and the last logit is "no object"."""
    sizes = dim, num_heads, dim_feedforward, dropout, checkpoint_activations
    transformer = Transformer(Encoder(enc_layers, *sizes), DETRDecoder(dec_layers, *sizes))
    return DETR(backbone, transformer, dim, num_classes + 1, num_queries, aux_loss)
