"""Common parts of the transformers of all models: DETR's encoder, and helpers for stacks of layers.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, appendix A.3.

Shapes: B images, S = H·W cells of the feature map, Q queries, C width, L decoder layers; `visible` [B, 1, 1, S] is
False on padding, or None if there is none.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import SelfAttention
from models.dropout import Dropout
from models.not_scriptable import NotScriptable


class MLP(NotScriptable, nn.Module):
    """Multilayer perceptron: linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out_dim] for x [.., in_dim]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Encoder layer: self-attention and feed-forward network, each followed by dropout, the residual sum and a norm."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """Return [B, S, C] for x and position [B, S, C]."""
        x = self.norm1(x + self.dropout(self.self_attn(x, position, visible)[0]))
        ffn = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(ffn))


class Encoder(nn.Module):
    """Stack of encoder layers, each of which adds the positions to its queries and keys.

    Args:
        num_layers: the number of layers.
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
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, dim_feedforward, dropout) for _ in range(num_layers))
        share_initial_vectors(self.layers)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """Return [B, S, C] for x and position [B, S, C]."""
        for layer in self.layers:
            x = run_layer(layer, self.checkpoint_activations, x, position, visible)
        return x


class Transformer(nn.Module):
    """Encoder and decoder, with matrices initialised as in DETR.

    Args:
        encoder: called with features, positions and `visible`.
        decoder: called with object queries, memory, positions and `visible`; returns outputs and reference points.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, x: Tensor, position: Tensor, padding: Tensor | None, query_pos: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return decoder outputs [L, B, Q, C], reference points [Q, 2] or None, and the encoder's memory [B, S, C].

        x and position: [B, S, C]; padding: [B, S], True for cells to mask, or None if there are none;
        query_pos: [Q, C].
        """
        visible = None if padding is None else ~padding[:, None, None, :]
        memory = self.encoder(x, position, visible)
        hs, reference = self.decoder(query_pos, memory, position, visible)
        return hs, reference, memory


def run_layer(layer: nn.Module, checkpoint_activations: bool, *inputs: Tensor | None) -> Tensor:
    """Return the output of a layer.

    With `checkpoint_activations`, the backward pass repeats the call, with the same dropout, to save memory.
    """
    return checkpoint(layer, *inputs, use_reentrant=False) if checkpoint_activations else layer(*inputs)


@torch.no_grad()
def share_initial_vectors(layers: nn.ModuleList) -> None:
    """Give all layers of a stack the biases and norms of the first layer, as if they were copies of it."""
    for layer in layers[1:]:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(layers[0].get_parameter(name))
