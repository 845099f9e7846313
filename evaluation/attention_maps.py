"""Attention maps of a decoder layer's queries over an image, split into content and spatial attention.

The queries and keys are the inputs of the layer's cross-attention, recorded in a forward pass.

Shapes: h heads, Q queries, feature map of H×W cells, S = H·W, e the width of queries and keys, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossAttention, split_heads
from models.conditional_detr import ConditionalDecoder
from models.detector import Detector
from models.detr import DETRDecoder


class AttentionMaps(NamedTuple):
    """Attention [h, Q, S] of every head and query over the image; each map sums to 1.

    spatial: the softmax of p_qᵀp_k alone.
    content: the softmax of c_qᵀc_k alone.
    combined: the softmax of their sum: the weights with which the model averages the values.
    """

    spatial: Tensor
    content: Tensor
    combined: Tensor


class View(NamedTuple):
    """Attention and predictions of a model on one image.

    maps: the maps of the requested layer, [h, Q, H, W].
    reference: [Q, 2], the (x, y) of each query's reference point; None for DETR, which has none.
    logits, boxes: [Q, K] and [Q, 4], the predictions of the last layer. Points and boxes (cxcywh) are relative to the
        image.

    All tensors are on the CPU.
    """

    maps: AttentionMaps
    reference: Tensor | None
    logits: Tensor
    boxes: Tensor


def attention_maps(query: Tensor, key: Tensor) -> AttentionMaps:
    """Return the maps of queries [h, Q, e] and keys [h, S, e]: the first half of e is content, the second spatial.

    Both halves are scaled by the width e of the whole, so that their logits add up to the logits of the model.
    """
    query = query * query.shape[-1] ** -0.5
    content, spatial = (q @ k.mT for q, k in zip(query.chunk(2, -1), key.chunk(2, -1), strict=True))  # [h, Q, S]
    return AttentionMaps(*(logits.softmax(-1) for logits in (spatial, content, content + spatial)))


@contextlib.contextmanager
def recorded(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """Yield a dict that receives the inputs and the output of the modules' latest calls."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] = inputs, output

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def maps_of_detr(layer: CrossAttention, inputs: tuple[Tensor, ...]) -> AttentionMaps:
    """Return the maps of DETR, whose queries q = c_q + o_q and keys are both sums (figure 1 of the paper).

    The spatial map is the softmax of qᵀp_k, the content map the softmax of qᵀc_k, where p_k and c_k are the projected
    position and memory. The bias of the keys is added to c_k; it changes no map.

    Args:
        layer: a layer's cross-attention.
        inputs: the inputs of its call: x, query_pos, memory, position.
    """
    x, query_pos, memory, position, *_ = inputs
    (w_q, w_k, _), (b_q, b_k, _) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    projected = F.linear(x + query_pos, w_q, b_q), F.linear(position, w_k), F.linear(memory, w_k, b_k)
    query, p_k, c_k = (split_heads(part, layer.num_heads)[0] for part in projected)  # [h, Q, e], [h, S, e] twice
    query = query * query.shape[-1] ** -0.5
    spatial, content = query @ p_k.mT, query @ c_k.mT  # [h, Q, S]
    return AttentionMaps(*(logits.softmax(-1) for logits in (spatial, content, content + spatial)))


@torch.inference_mode()
def view(model: Detector, image: Tensor, layer: int = -1) -> View:
    """Run a model in evaluation mode on one image [3, h, w], uint8 or normalised; return a layer's attention."""
    decoder = model.transformer.decoder
    assert isinstance(decoder, ConditionalDecoder | DETRDecoder)
    name = "multihead_attn" if isinstance(decoder, DETRDecoder) else "cross_attn"
    attention = decoder.layers[layer].get_submodule(name)
    with recorded(model.input_proj, model.transformer, attention) as calls:
        outputs = model([image])
    cells = calls[model.input_proj][1].shape[-2:]
    inputs, _ = calls[attention]
    if isinstance(attention, CrossAttention):
        maps = maps_of_detr(attention, inputs)
    else:
        maps = attention_maps(inputs[0][0], inputs[1][0])
    maps = AttentionMaps(*(x.unflatten(-1, cells).cpu() for x in maps))
    _, reference, _ = calls[model.transformer][1]
    reference = None if reference is None else reference.cpu()
    return View(maps, reference, outputs["pred_logits"][0].cpu(), outputs["pred_boxes"][0].cpu())
