"""Names of this model's weights in Hugging Face transformers: one table for both directions.

The table has the names in files, which all versions read and write. Since version 5, the modules have other names;
`FROM_MODULES` and `MASK_HEAD` map these to the names in files. In files, the names of the mask head equal ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from checkpoints.weight_flags import DETECTOR

Weights = dict[str, Tensor]

# Our names of modules and theirs; for a module within another, the longer name takes precedence.
MODULES = {
    "class_embed": "class_labels_classifier",
    "bbox_embed": "bbox_predictor",
    "query_embed": "model.query_position_embeddings",
    "input_proj": "model.input_projection",
    "transformer": "model",
    "transformer.decoder.norm": "model.decoder.layernorm",
    "backbone.1.row_embed": "model.position_embedding.row_embeddings",
    "backbone.1.col_embed": "model.position_embedding.column_embeddings",
    "backbone.0.body": "model.backbone.conv_encoder.model",  # timm's ResNet has the names of torchvision's
}
LAYER = {
    "encoder": {
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
    },
    "decoder": {
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}
CROSS_ATTENTION = {"conditional_detr": "cross_attn", "detr": "multihead_attn"}  # our names; theirs is encoder_attn
# transformers' own ResNet: names within the body, and within each block of its four stages.
STEM = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
BLOCK = {
    **{f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)},
    **{f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)},
    "downsample.0": "shortcut.convolution",
    "downsample.1": "shortcut.normalization",
}

FROM_MODULES = (
    (r"\bmodel\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\bmodel\.backbone\.position_embedding\.", "model.position_embedding."),  # version 4, in files too
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc([12])\.", r".fc\1."),
)
# Only for Conditional DETR, whose layers contain the projections directly.
FROM_CONDITIONAL_MODULES = (
    (r"\.self_attn\.([qk])_(content|pos)_proj\.", r".sa_\1\2_proj."),
    (r"(\.decoder\..*)\.self_attn\.v_proj\.", r"\1.sa_v_proj."),
    (r"\.encoder_attn\.([qk])_(content|pos|pos_sine)_proj\.", r".ca_\1\2_proj."),
    (r"\.encoder_attn\.v_proj\.", ".ca_v_proj."),
)
MASK_HEAD = {
    **{"bbox_attention.q_proj": "bbox_attention.q_linear", "bbox_attention.k_proj": "bbox_attention.k_linear"},
    **{"mask_head.conv1.conv": "mask_head.lay1", "mask_head.conv1.norm": "mask_head.gn1"},
    **{"mask_head.conv2.conv": "mask_head.lay2", "mask_head.conv2.norm": "mask_head.gn2"},
    **{f"mask_head.fpn_stages.{i}.refine.conv": f"mask_head.lay{i + 3}" for i in range(3)},
    **{f"mask_head.fpn_stages.{i}.refine.norm": f"mask_head.gn{i + 3}" for i in range(3)},
    **{f"mask_head.fpn_stages.{i}.fpn_adapter": f"mask_head.adapter{i + 1}" for i in range(3)},
    "mask_head.output_conv": "mask_head.out_lay",
}


def their_modules(
    num_encoder_layers: int,
    num_decoder_layers: int,
    depths: list[int] | None,
    model: str = "conditional_detr",
    masks: bool = False,
) -> dict[str, str]:
    """Return our modules' names and theirs for a model with these numbers of layers.

    Args:
        depths: number of blocks per stage of their own ResNet; None for timm's ResNet.
        masks: the model has a mask head on top of its detector.
    """
    names = dict(MODULES)
    for stack, num_layers in (("encoder", num_encoder_layers), ("decoder", num_decoder_layers)):
        for i, (ours, theirs) in product(range(num_layers), LAYER[stack].items()):
            names[f"transformer.{stack}.layers.{i}.{ours}"] = f"model.{stack}.layers.{i}.{theirs}"
    for i in range(num_decoder_layers):
        cross_attention = f"transformer.decoder.layers.{i}.{CROSS_ATTENTION[model]}"
        names[cross_attention] = f"model.decoder.layers.{i}.encoder_attn"
    if depths:
        body, their_body = "backbone.0.body", MODULES["backbone.0.body"]
        names |= {f"{body}.{ours}": f"{their_body}.{theirs}" for ours, theirs in STEM.items()}
        for stage, depth in enumerate(depths):
            for i, (ours, theirs) in product(range(depth), BLOCK.items()):
                their_block = f"{their_body}.encoder.stages.{stage}.layers.{i}"
                names[f"{body}.layer{stage + 1}.{i}.{ours}"] = f"{their_block}.{theirs}"
    prefix = DETECTOR if masks else ""
    return {prefix + ours: prefix + theirs for ours, theirs in names.items()}


def to_theirs(weights: Weights, modules: dict[str, str]) -> Weights:
    """Return our weights under their names in files; `modules` comes from `their_modules`.

    Batch counters of trained norms are dropped, since their norms are frozen.
    """
    return {
        renamed(key, modules): tensor
        for key, tensor in split_projections(weights)
        if not key.endswith("num_batches_tracked")
    }


def to_ours(weights: Weights, modules: dict[str, str], model: str = "conditional_detr") -> Weights:
    """Return their weights, from a file or a model in memory, under our names; unknown keys stay unchanged."""
    ours = {theirs: name for name, theirs in modules.items()}
    return join_projections(
        {
            renamed(name_in_files(key, model), ours): tensor
            for key, tensor in weights.items()
            if not key.endswith("num_batches_tracked")
        }
    )


def renamed(key: str, modules: dict[str, str]) -> str:
    """Replace the longest module name at the beginning of a key."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if name := modules.get(".".join(parts[:n])):
            return ".".join([name, *parts[n:]])
    return key


def name_in_files(key: str, model: str = "conditional_detr") -> str:
    """Convert the name of a weight in a model in memory to its name in files."""
    for pattern, replacement in FROM_MODULES + FROM_CONDITIONAL_MODULES * (model == "conditional_detr"):
        key = re.sub(pattern, replacement, key)
    return renamed(key, MASK_HEAD)


def split_projections(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with fused projections split into three, under `{q,k,v}_proj`."""
    for key, tensor in weights.items():
        if fused := re.fullmatch(r"(.*\.(?:self|multihead)_attn\.)in_proj_(weight|bias)", key):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{fused[1]}{name}_proj.{fused[2]}", part
        else:
            yield key, tensor


def join_projections(weights: Weights) -> Weights:
    """Invert `split_projections`."""
    joined = {}
    for key, tensor in weights.items():
        part = re.fullmatch(r"(.*\.(?:self|multihead)_attn\.)([qkv])_proj\.(weight|bias)", key)
        if not part:
            joined[key] = tensor
        elif part[2] == "q":
            keys = [f"{part[1]}{name}_proj.{part[3]}" for name in "qkv"]
            parts = [weights[key] for key in keys if key in weights]
            # Otherwise, the fused projection is reported as missing.
            if len(parts) == 3 and all(p.dim() > 0 and p.shape == tensor.shape for p in parts):
                joined[f"{part[1]}in_proj_{part[3]}"] = torch.cat(parts)
    return joined
