"""Faster attention for predictions in bfloat16 on CPUs without AMX, Intel's units for matrix products.

PyTorch's kernel computes logits and weights in float32. In bfloat16, as training with dropout computes them, they take
half the time, if there are never more of them than fit into the processor's cache. With AMX, which PyTorch's kernel
uses, they take twice the time. The plain version is `models.attention.attend_in_full`.

Shapes: B images, h heads, N queries, S keys, e the width of queries and keys, d that of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.modes import needs_only_values

ROWS = 48  # queries in a block
WEIGHTS = 2**20  # of images that are computed together; larger images are computed one by one


def are_faster(*tensors: Tensor) -> bool:
    """Return whether, on a CPU, attention in blocks supports these tensors and is faster than PyTorch's kernel."""
    in_bfloat16 = tensors[0].dtype == torch.bfloat16
    return in_bfloat16 and not torch.cpu._is_amx_tile_supported() and needs_only_values(*tensors)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(e)) v, [B, h, N, d].

    Args:
        query, key, value: [B, h, N, e], [B, h, S, e], [B, h, S, d].
        visible: [B, 1, 1, S], False for keys that are masked; None if none are.
    """
    images = max(WEIGHTS // (query.shape[1:3].numel() * key.shape[2]), 1)
    parts = [tensor.split(images) for tensor in (query, key, value)]
    masks = [None] * len(parts[0]) if visible is None else visible.split(images)
    return torch.cat([attend_images(*part) for part in zip(*parts, masks, strict=True)])


def attend_images(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Return the result of `attend_in_blocks`, with all images in every block."""
    queries = query * query.shape[-1] ** -0.5
    keys, values = key.mT.contiguous(), value.contiguous()  # [B, h, e, S], [B, h, S, d]
    hidden = None if visible is None else torch.where(visible, 0.0, -torch.inf).to(query.dtype)  # [B, 1, 1, S]
    return torch.cat([attend_block(block, keys, values, hidden) for block in queries.split(ROWS, dim=2)], dim=2)


def attend_block(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Return softmax(q k + hidden) v, [B, h, n, d], for n scaled queries."""
    logits = queries @ keys
    return (logits if hidden is None else logits.add_(hidden)).softmax(-1) @ values
