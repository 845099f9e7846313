"""Multi-head attention, the part that encoder and decoder share.

Shapes: B images, h heads, N queries, S keys, C width, d = C / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] to [B, h, N, C / h]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, h, N, d] to [B, N, h * d]."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(width of q)) v in every head, and the output projection.

    Queries, keys and values are projected by the caller: how their content and position combine is what the layers of
    this model differ in. Queries and keys may be wider than values.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """[B, h, N, dk], [B, h, S, dk], [B, h, S, d] to [B, N, C]; keys where `padding` [B, S] is True are not seen."""
        visible = None if padding is None else ~padding[:, None, None, :]  # [B, 1, 1, S]
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return self.out_proj(merge_heads(x))


class SelfAttention(Attention):
    """The encoder's self-attention: one fused projection, the position added to query and key."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None = None) -> Tensor:
        """X and position [B, S, C], padding [B, S] to [B, S, C]."""
        dim = x.shape[-1]
        w_qk, w_v = self.in_proj_weight.split([2 * dim, dim])
        b_qk, b_v = self.in_proj_bias.split([2 * dim, dim])
        query, key = F.linear(x + position, w_qk, b_qk).chunk(2, dim=-1)
        value = F.linear(x, w_v, b_v)
        return super().forward(*(split_heads(t, self.num_heads) for t in (query, key, value)), padding)
