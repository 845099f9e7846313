"""Attention that does not store its weights for the backward pass, which computes them again, part by part.

On CPUs, training with dropout needs the N×S weights of every head. Those of all layers of DC5-R50 take more memory than
everything else. Only a byte per weight is stored, which tells whether dropout keeps it. Results and gradients of
`in_parts` have the same bits as those of the function that it is given.

Shapes: B images, h heads, N queries, S keys, d the width of values, e the width of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.dropout import draw_kept
from models.modes import needs_gradients

LARGE = 2**17  # weights of a head; up to this number they are stored, as in the decoder's self-attention
PART = 2**20  # weights that are computed at once: 4 MB stay in a core's cache. A single head may have more.

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float, Tensor], Tensor]


def is_large(query: Tensor, key: Tensor) -> bool:
    """Return whether gradients need too many weights to store them, for queries [B, h, N, e], keys [B, h, S, e]."""
    return needs_gradients(query, key) and query.shape[2] * key.shape[2] > LARGE


def in_parts(attend: Attend, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, p: float) -> Tensor:
    """Return `attend(query, key, value, visible, p)`, [B, h, N, d]; for its arguments see `attend_in_full`."""
    # With the memory layout that a single product of all heads would use.
    heads = query.flatten(0, 1), key.mT.flatten(0, 1).mT, value.flatten(0, 1)
    mask = None if visible is None else visible.expand(*query.shape[:2], -1, -1).flatten(0, 1)
    return InParts.apply(attend, *heads, mask, p).unflatten(0, query.shape[:2])


class InParts(torch.autograd.Function):
    """`in_parts` for queries, keys, values and mask [B·h, .., ..].

    The first part allocates the memory of the whole result. If parts were collected in a list, each would lie in the
    middle of the memory that the next part needs again.
    """

    @staticmethod
    def forward(
        ctx: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float
    ) -> Tensor:
        ctx.attend, ctx.p = attend, p
        kept = torch.empty(len(query), query.shape[1], key.shape[1], dtype=torch.uint8)
        ctx.save_for_backward(query, key, value, mask, kept)
        ctx.autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        result: Any = None
        for part in parts(query, key):
            kept[part] = draw_kept(kept[part].shape, p, kept.dtype)
            output = attend(query[part], key[part], value[part], None if mask is None else mask[part], p, kept[part])
            result = output.new_empty(len(query), *output.shape[1:]) if result is None else result
            result[part] = output
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *heads, mask, kept = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in heads]
        with torch.enable_grad(), torch.autocast("cpu", *ctx.autocast):
            for part in parts(*heads[:2]):
                inputs = [x[part].detach().requires_grad_() for x in heads]
                output = ctx.attend(*inputs, None if mask is None else mask[part], ctx.p, kept[part])
                of_inputs = torch.autograd.grad(output, inputs, gradient[part])
                for whole, of_part in zip(gradients, of_inputs, strict=True):
                    whole[part] = of_part
        return None, *gradients, None, None


def parts(query: Tensor, key: Tensor) -> list[slice]:
    """Return slices of the heads of all images, for queries [B·h, N, e] and keys [B·h, S, e].

    Four neighbouring weights share a random number (`models.dropout`). Parts begin at multiples of four weights, so
    that each weight gets the random number that it would get without parts.
    """
    weights_of_head = query.shape[1] * key.shape[1]
    heads = 4 // gcd(4, weights_of_head)
    heads *= max(PART // weights_of_head // heads, 1)
    return [slice(first, first + heads) for first in range(0, len(query), heads)]
