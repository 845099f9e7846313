"""The transformer of Conditional DETR: DETR's encoder, and a decoder with conditional cross-attention.

Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021; the sections named below are the paper's.

Shapes: B images, S = H·W cells of the feature map, Q queries, C width, h heads, L decoder layers; `visible`
[B, 1, 1, S] is False on padding, or None where there is none.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, SelfAttention, split_heads
from models.dropout import Dropout
from models.position_encoding import point_embedding
from util.errors import InputError
from util.precision import at_least_float32, without_autocast


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with residual, dropout and norm behind it."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """X and position [B, S, C] to [B, S, C]."""
        x = self.norm1(x + self.dropout(self.self_attn(x, position, visible)[0]))
        ffn = self.linear2(self.dropout(F.relu(self.linear1(x), inplace=True)))
        return self.norm2(x + self.dropout(ffn))


class Encoder(nn.Module):
    def __init__(self, num_layers: int, *layer_args: float, checkpoint_activations: bool) -> None:
        super().__init__()
        self.run = run_checkpointed if checkpoint_activations else run
        self.layers = nn.ModuleList(EncoderLayer(*layer_args) for _ in range(num_layers))
        share_initial_vectors(self.layers)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x, position, visible)
        return x


class DecoderLayer(nn.Module):
    """Self-attention among the queries, conditional cross-attention to the image, feed-forward network.

    In the cross-attention (section 3.3) every head's query is the concatenation of a content part c_q and a spatial
    part p_q, every key that of c_k and p_k, so that the logit is the sum c_qᵀc_k + p_qᵀp_k. The first layer, whose
    queries hold no content yet, also adds the positions to the content parts.
    """

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
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
        self, x: Tensor, query_pos: Tensor, p_q: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        """One refinement of the decoder embeddings.

        x: [B, Q, C] decoder embeddings; query_pos: [Q, C] object queries; p_q: [Q, C] or [B, Q, C] spatial queries;
        memory and position: [B, S, C] encoder output and positions. Returns [B, Q, C].
        """
        x = self.norm1(x + self.dropout(self.attend_to_queries(x, query_pos)))
        x = self.norm2(x + self.dropout(self.attend_to_image(x, query_pos, p_q, memory, position, visible)))
        ffn = self.linear2(self.dropout(F.relu(self.linear1(x), inplace=True)))
        return self.norm3(x + self.dropout(ffn))

    def attend_to_queries(self, x: Tensor, query_pos: Tensor) -> Tensor:
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        v = self.sa_v_proj(x)
        return self.self_attn(*(split_heads(t, self.num_heads) for t in (q, k, v)))[0]

    def attend_to_image(
        self, x: Tensor, query_pos: Tensor, p_q: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> Tensor:
        c_q = self.ca_qcontent_proj(x)
        c_k = self.ca_kcontent_proj(memory)
        p_q = self.ca_qpos_sine_proj(p_q).expand_as(c_q)
        p_k = self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            c_q = c_q + self.ca_qpos_proj(query_pos)
            c_k = c_k + p_k
        q = torch.cat([split_heads(c_q, self.num_heads), split_heads(p_q, self.num_heads)], dim=-1)  # [B, h, Q, 2C / h]
        k = torch.cat([split_heads(c_k, self.num_heads), split_heads(p_k, self.num_heads)], dim=-1)  # [B, h, S, 2C / h]
        v = split_heads(self.ca_v_proj(memory), self.num_heads)  # [B, h, S, C / h]
        return self.cross_attn(q, k, v, visible)[0]


class Decoder(nn.Module):
    def __init__(self, num_layers: int, dim: int, *layer_args: float, checkpoint_activations: bool) -> None:
        super().__init__()
        self.run = run_checkpointed if checkpoint_activations else run
        self.layers = nn.ModuleList(DecoderLayer(dim, *layer_args, first=i == 0) for i in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        # λ_q of section 3.3, read from the embeddings of the layer before: a single layer has none.
        self.query_scale = MLP(dim, dim, dim, 2) if num_layers > 1 else None
        self.ref_point_head = MLP(dim, dim, 2, 2)
        share_initial_vectors(self.layers)

    def forward(
        self, query_pos: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """query_pos [Q, C], memory and position [B, S, C] to outputs [L, B, Q, C] and reference points [Q, 2]."""
        with without_autocast(query_pos.device):  # points keep at least float32
            reference = at_least_float32(self.ref_point_head(query_pos)).sigmoid()
        p_s = point_embedding(*reference.unbind(-1), dim=query_pos.shape[-1]).to(query_pos.dtype)  # [Q, C]
        x = memory.new_zeros(memory.shape[0], *query_pos.shape)
        outputs = []
        for i, layer in enumerate(self.layers):
            p_q = p_s if i == 0 else self.query_scale(x) * p_s  # equation (5): λ_q ⊙ p_s
            x = self.run(layer, x, query_pos, p_q, memory, position, visible)
            outputs.append(self.norm(x))
        return torch.stack(outputs), reference


class Transformer(nn.Module):
    """Encoder and decoder.

    Args:
        dim: the width C, a multiple of 4 (sines and cosines of x and y) and of `num_heads`.
        num_heads: attention heads.
        num_encoder_layers, num_decoder_layers: depth of the two stacks.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: on attention weights, residual branches and inside the feed-forward networks.
        checkpoint_activations: keep only the inputs of the layers for the backward pass, which computes the rest anew.

    Raises:
        InputError: for a width that does not divide, without a decoder layer, or where all would be dropped.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 4 or num_heads < 1 or dim % num_heads:
            raise InputError(f"--hidden_dim {dim} must be a multiple of 4 and of --nheads {num_heads}")
        if num_encoder_layers < 0 or num_decoder_layers < 1:
            raise InputError("--enc_layers must be at least 0 and --dec_layers at least 1")
        if not 0 <= dropout < 1:
            raise InputError(f"--dropout {dropout} must be at least 0 and less than 1")
        layer_args = (dim, num_heads, dim_feedforward, dropout)
        self.encoder = Encoder(num_encoder_layers, *layer_args, checkpoint_activations=checkpoint_activations)
        self.decoder = Decoder(num_decoder_layers, *layer_args, checkpoint_activations=checkpoint_activations)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None, query_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Image features to decoder embeddings.

        x and position: [B, S, C]; padding: [B, S], True for cells to leave out, or None where there are none;
        query_pos: [Q, C]. Returns outputs [L, B, Q, C] and reference points [Q, 2].
        """
        visible = None if padding is None else ~padding[:, None, None, :]
        memory = self.encoder(x, position, visible)
        return self.decoder(query_pos, memory, position, visible)


def run(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    return layer(*inputs)


def run_checkpointed(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    """As `run`; the backward pass repeats it, with the same dropout, instead of keeping what is between."""
    return checkpoint(layer, *inputs, use_reentrant=False)


@torch.no_grad()
def share_initial_vectors(layers: nn.ModuleList) -> None:
    """Starts all layers of a stack with the biases of the first, as copies of one layer would."""
    for layer in layers[1:]:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(layers[0].get_parameter(name))
