"""Flags of a model that its weights determine: sizes, layers, backbone, but not --nheads and --dilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Flags that equal the first dimension of a weight, and flags that equal the number of layers of a stack.
SIZES = {
    "hidden_dim": "transformer.decoder.norm.weight",
    "dim_feedforward": "transformer.decoder.layers.0.linear1.weight",
}
STACKS = {"enc_layers": "transformer.encoder.layers.", "dec_layers": "transformer.decoder.layers."}
QUERIES = "query_embed.weight"
BACKBONES = {  # a weight that the backbones below do not have
    "resnet101": "backbone.0.body.layer3.22.conv3.weight",
    "resnet50": "backbone.0.body.layer3.5.conv3.weight",
    "resnet34": "backbone.0.body.layer3.5.conv1.weight",
    "resnet18": "backbone.0.body.layer3.1.conv1.weight",
}
BATCH_COUNTER = "backbone.0.body.bn1.num_batches_tracked"
CROSS_ATTENTION_OF_DETR = "transformer.decoder.layers.0.multihead_attn.in_proj_weight"
LEARNED_POSITIONS = "backbone.1.row_embed.weight"
MASK_HEAD = "mask_head.lay1.weight"
DETECTOR = "detr."  # prefix of the detector's weights in a model with masks


def has_masks(weights: Mapping[str, Any]) -> bool:
    """Return whether a state dict belongs to a model with masks."""
    return MASK_HEAD in weights


def of_detector(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the detector in a state dict, by their names in a model without masks."""
    if not has_masks(weights):
        return dict(weights)
    return {key.removeprefix(DETECTOR): value for key, value in weights.items() if key.startswith(DETECTOR)}


def model_of(weights: Mapping[str, Tensor]) -> str:
    """Return the value of `--model` for a state dict."""
    return "detr" if CROSS_ATTENTION_OF_DETR in of_detector(weights) else "conditional_detr"


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the flags for sizes of the transformer in a state dict; flags without their weight are left out."""
    weights = of_detector(weights)
    told = {flag: weights[key].shape[0] for flag, key in SIZES.items() if key in weights and weights[key].dim() > 0}
    for flag, prefix in STACKS.items():
        layers = {key.removeprefix(prefix).partition(".")[0] for key in weights if key.startswith(prefix)}
        told |= {flag: len(layers)} if layers else {}
    return told


def flags_of(weights: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Return all flags that a state dict determines; a stack without a weight has 0 layers."""
    told: dict[str, int | str] = {**dict.fromkeys(STACKS, 0), **sizes_of(weights)}
    if has_masks(weights):
        told["masks"] = True
    weights = of_detector(weights)
    if QUERIES in weights and weights[QUERIES].dim() > 0:
        told["num_queries"] = weights[QUERIES].shape[0]
    if backbone := next((name for name, key in BACKBONES.items() if key in weights), None):
        told["backbone"] = backbone
    told["model"] = model_of(weights)
    told["backbone_norm"] = "batch" if BATCH_COUNTER in weights else "frozen"
    told["position_embedding"] = "learned" if LEARNED_POSITIONS in weights else "sine"
    return told
