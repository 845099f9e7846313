"""Faster attention for predictions in bfloat16 on CPUs.

PyTorch's kernel computes logits and weights in float32. In bfloat16, as training with dropout computes them, they take
half the time, if there are never more of them than fit into the processor's cache. The plain version is
`models.attention.attend_in_full`.

Shapes: B images, h heads, N queries, S keys, e the width of queries and keys, d that of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**20  # weights of all heads that are computed at once: 2 MB


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(e)) v, [B, h, N, d].

    Args:
        query, key, value: [B, h, N, e], [B, h, S, e], [B, h, S, d].
        visible: [B, 1, 1, S], False for keys that are masked; None if none are.
    """
    heads = query.shape[:2]
    queries = (query * query.shape[-1] ** -0.5).flatten(0, 1)  # [B·h, N, e]
    keys = key.mT.flatten(0, 1).contiguous()  # [B·h, e, S]
    values = value.flatten(0, 1).contiguous()  # [B·h, S, d]
    hidden = None
    if visible is not None:
        hidden = torch.where(visible, 0.0, -torch.inf).to(query.dtype).expand(*heads, -1, -1).flatten(0, 1)
    blocks = queries.split(max(BLOCK // (len(keys) * keys.shape[2]), 1), dim=1)
    outputs = [attend_block(block, keys, values, hidden) for block in blocks]
    return torch.cat(outputs, dim=1).unflatten(0, heads)


def attend_block(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Return softmax(q k + hidden) v for queries [B·h, n, e], keys [B·h, e, S] and values [B·h, S, d]."""
    logits = queries @ keys
    return (logits if hidden is None else logits.add_(hidden)).softmax(-1) @ values
