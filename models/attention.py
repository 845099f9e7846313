"""Multi-head attention, which encoder and decoder share, and the choice of its kernel.

Shapes: B images, h heads, N queries, S keys, C width, d = C / h, e the width of queries and keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from models.blocked_attention import are_faster, attend_in_blocks
from models.dropout import dropout
from models.fast_linear import linear
from models.modes import is_transformed
from models.not_scriptable import NotScriptable
from models.recomputed_attention import in_parts, is_large

# PyTorch's counter of FLOPs has formulas only for the kernels of GPUs, and counts attention on CPUs as 0.
for kernel, flops in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    if kernel not in flop_registry:
        register_flop_formula(kernel, get_raw=True)(flops)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split [B, N, C] into heads, [B, h, N, C / h]."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Merge heads [B, h, N, d] into [B, N, h * d]."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, p: float) -> Tensor:
    """Return softmax(q kᵀ / sqrt(e)) v, with dropout on the weights, by the kernel that suits the device.

    PyTorch's fused kernels never store the N×S matrix of weights, so memory grows with N + S. The kernels for GPUs
    support everything that the models need. The kernel for CPUs has no dropout and needs values as wide as the queries;
    for other inputs, PyTorch computes the matrix, always in float32. On CPUs, values are therefore padded with zeros,
    and training with dropout computes the matrix here, in the input's precision and with cheaper random numbers.
    On some CPUs, predictions in bfloat16 do so in blocks, and training in parts if the matrix is large; neither stores
    it. Tracing and torch.func's transforms compute the matrix, too: ONNX and fvcore's counter of FLOPs, for example, do
    not know the kernels.

    Args:
        query, key, value: [B, h, N, e], [B, h, S, e], [B, h, S, d].
        visible: [B, 1, 1, S], False for keys that are masked; None if none are.
        p: the probability that a weight is dropped.

    Return [B, h, N, d].
    """
    if not (torch.jit.is_tracing() or is_transformed()):
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=p)
        if p == 0 and are_faster(query, key, value):
            return attend_in_blocks(query, key, value, visible)
        if p == 0:
            widened = F.pad(value, (0, query.shape[-1] - value.shape[-1]))  # [B, h, S, e]
            return F.scaled_dot_product_attention(query, key, widened, attn_mask=visible)[..., : value.shape[-1]]
        if is_large(query, key) and not torch.compiler.is_compiling():
            return in_parts(attend_in_full, query, key, value, visible, p)  # the same with less memory
    return attend_in_full(query, key, value, visible, p)


def attend_in_full(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, p: float, kept: Tensor | None = None
) -> Tensor:
    """Return the result of `attend`, computed from the matrix of all weights.

    kept: [B, h, N, S], the weights that dropout keeps, from `models.dropout.draw_kept`; None: draw them.
    """
    weights = attention_weights(query, key, visible)
    return (dropout(weights, p, kept) if p > 0 else weights) @ value


def attention_weights(query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(e)) [B, h, N, S]; for the arguments see `attend`."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, h, N, S]
    if visible is not None:
        logits = logits + torch.where(visible, 0.0, -torch.inf).to(logits.dtype)
    return logits.softmax(-1)


class MultiHeadAttention(NotScriptable, nn.Module):
    """Base class of attention: softmax(q kᵀ / sqrt(e)) v in every head, and the output projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, N, C] and, if this module has forward hooks, the weights [B, N, S], else None.

        Hooks receive the same weights as those of `nn.MultiheadAttention`: the mean over the heads, without dropout.

        Args:
            query, key, value: [B, h, N, e], [B, h, S, e], [B, h, S, d].
            visible: [B, 1, 1, S] as in `attend`.
        """
        x = attend(query, key, value, visible, self.dropout if self.training else 0.0)
        weights = attention_weights(query, key, visible).mean(1) if self._forward_hooks else None
        return self.out_proj(merge_heads(x)), weights


class Attention(MultiHeadAttention):
    """Attention of queries, keys and values that the caller projects, since layers combine content and position in
    different ways. Queries and keys may be wider than values."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of `attend_heads`."""
        return self.attend_heads(query, key, value, visible)


class PackedAttention(MultiHeadAttention):
    """Attention with one matrix for the projections of queries, keys and values, like `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the projection of x [.., C] by some rows of the matrix and of the bias."""
        return linear(x, weight, bias)

    def attend_projected(self, *projected: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the result of `attend_heads` for projected queries, keys and values [B, .., C]."""
        query, key, value = (split_heads(x, self.num_heads) for x in projected)
        return self.attend_heads(query, key, value, visible)


class SelfAttention(PackedAttention):
    """Self-attention whose queries and keys have a position added."""

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return [B, N, C] and weights [B, N, N] or None, like `attend_heads`.

        x: [B, N, C]; position: [B, N, C], or [N, C] for all images.
        """
        dim = x.shape[-1]
        w_qk, w_v = self.in_proj_weight.split([2 * dim, dim])
        b_qk, b_v = self.in_proj_bias.split([2 * dim, dim])
        query, key = self.project(x + position, w_qk, b_qk).chunk(2, dim=-1)
        value = self.project(x, w_v, b_v)
        return self.attend_projected(query, key, value, visible=visible)


class CrossAttention(PackedAttention):
    """Attention of queries to an image, both with a position added; the values have none."""

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return [B, N, C] and weights [B, N, S] or None, like `attend_heads`.

        x: [B, N, C]; query_pos: [N, C]; memory and position: [B, S, C].
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = x + query_pos, memory + position, memory
        return self.attend_projected(*map(self.project, inputs, weights, biases), visible=visible)
