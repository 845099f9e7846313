"""Conditional DETR: separate content and spatial attention in the decoder, and boxes as offsets from reference points.

Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021; sections are those of this paper.
Groups of queries: Chen et al., "Group DETR", ICCV 2023.

Shapes: B images, S = H·W cells of the feature map, Q queries in G groups (a single group in evaluation mode), C width,
h heads, L decoder layers; `visible` [B, 1, 1, S] is False on padding, or None if there is none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, split_heads
from models.backbone import Joiner
from models.detector import Detector
from models.dropout import Dropout
from models.position_encoding import point_embedding
from models.transformer import MLP, Encoder, Transformer, run_layer, share_initial_vectors
from util.box_ops import inverse_sigmoid
from util.precision import at_least_float32, without_autocast

PRIOR_PROBABILITY = 0.01  # of every class at the start of training (Lin et al., ICCV 2017, section 3.3)


class ConditionalDecoderLayer(nn.Module):
    """Decoder layer: self-attention among the queries, conditional cross-attention to the image, feed-forward network.

    In the cross-attention (section 3.3) every head's query is the concatenation of a content part c_q and a spatial
    part p_q, and every key that of c_k and p_k, so that the logit is the sum c_qᵀc_k + p_qᵀp_k. The first layer, whose
    queries have no content yet, also adds the positions to the content parts.

    In training, queries attend only to queries of the same group.
    """

    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, first: bool, num_groups: int = 1
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = Attention(dim, num_heads, dropout)
        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, query_pos: Tensor, spatial: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Refine the decoder embeddings.

        Args:
            x: [B, Q, C], the embeddings.
            query_pos: [Q, C], the object queries.
            spatial: [Q, C] or [B, Q, C], the spatial queries λ_q ⊙ p_s.
            memory, position: [B, S, C], the encoder's output and the positions of its cells.
            visible: as above.

        Return [B, Q, C].
        """
        x = self.norm1(x + self.dropout(self.attend_to_queries(x, query_pos)))
        x = self.norm2(x + self.dropout(self.attend_to_image(x, query_pos, spatial, memory, position, visible)))
        ffn = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(ffn))

    def attend_to_queries(self, x: Tensor, query_pos: Tensor) -> Tensor:
        """Return the output of the self-attention within groups, [B, Q, C]."""
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        v = self.sa_v_proj(x)
        if self.training and self.num_groups > 1:
            q, k, v = (t.unflatten(1, (self.num_groups, -1)).flatten(0, 1) for t in (q, k, v))  # [B·G, Q / G, C]
        return self.self_attn(*(split_heads(t, self.num_heads) for t in (q, k, v)))[0].reshape_as(x)

    def attend_to_image(
        self, x: Tensor, query_pos: Tensor, spatial: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Return the output of the cross-attention, [B, Q, C]."""
        c_q = self.ca_qcontent_proj(x)
        c_k = self.ca_kcontent_proj(memory)
        p_q = self.ca_qpos_sine_proj(spatial).expand_as(c_q)
        p_k = self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            c_q = c_q + self.ca_qpos_proj(query_pos)
            c_k = c_k + p_k
        q = torch.cat([split_heads(c_q, self.num_heads), split_heads(p_q, self.num_heads)], dim=-1)  # [B, h, Q, 2C / h]
        k = torch.cat([split_heads(c_k, self.num_heads), split_heads(p_k, self.num_heads)], dim=-1)  # [B, h, S, 2C / h]
        v = split_heads(self.ca_v_proj(memory), self.num_heads)  # [B, h, S, C / h]
        return self.cross_attn(q, k, v, visible)[0]


class ConditionalDecoder(nn.Module):
    """Decoder layers that share one reference point per query.

    Args:
        num_layers: L.
        dim: the width C.
        num_heads, dim_feedforward, dropout: of each layer.
        checkpoint_activations: compute activations again in the backward pass instead of storing them.
        num_groups: G, in training.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        checkpoint_activations: bool = False,
        num_groups: int = 1,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(dim, num_heads, dim_feedforward, dropout, i == 0, num_groups)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        if num_layers > 1:  # λ_q of section 3.3, computed from the embeddings of the previous layer
            self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(dim, dim, 2, 2)
        share_initial_vectors(self.layers)

    def forward(
        self, query_pos: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return outputs [L, B, Q, C] and reference points [Q, 2].

        query_pos: [Q, C]; memory and position: [B, S, C]; visible: as above.
        """
        with without_autocast(query_pos.device):  # reference points keep at least float32
            reference = at_least_float32(self.ref_point_head(query_pos)).sigmoid()
        x, y = reference.unbind(-1)
        p_s = point_embedding(x, y, query_pos.shape[-1]).to(query_pos.dtype)  # [Q, C]
        x = memory.new_zeros(memory.shape[0], *query_pos.shape)
        outputs = []
        for i, layer in enumerate(self.layers):
            spatial = p_s if i == 0 else self.query_scale(x) * p_s  # section 3.3: p_q = λ_q ⊙ p_s
            x = run_layer(layer, self.checkpoint_activations, x, query_pos, spatial, memory, position, visible)
            outputs.append(self.norm(x))
        return torch.stack(outputs), reference


class ConditionalDETR(Detector):
    """Meng et al., ICCV 2021: one logit per class, and boxes that are offsets from reference points."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.constant_(self.class_embed.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        for parameter in self.bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def boxes(self, hs: Tensor, reference: Tensor | None) -> Tensor:
        """Return boxes [L, B, Q, 4] for decoder outputs [L, B, Q, C].

        Their centres are predicted as offsets from the reference points [Q, 2] (section 3.1).
        """
        assert reference is not None  # the decoder returns them
        offset = F.pad(inverse_sigmoid(reference), (0, 2))  # [Q, 4]
        return (self.bbox_embed(hs) + offset).sigmoid()


def build_conditional_detr(
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
    num_groups: int = 1,
) -> ConditionalDETR:
    """Return a randomly initialised model; class ids are 0 to `num_classes` - 1, without a background class.

    Training uses `num_groups` groups of `num_queries` queries each (Group DETR).
    """
    sizes = dim, num_heads, dim_feedforward, dropout, checkpoint_activations
    transformer = Transformer(Encoder(enc_layers, *sizes), ConditionalDecoder(dec_layers, *sizes, num_groups))
    return ConditionalDETR(backbone, transformer, dim, num_classes, num_queries, aux_loss, num_groups)
