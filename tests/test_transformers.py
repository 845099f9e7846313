"""Hugging Face transformers' implementation with the same weights gives the same outputs."""

import re

import pytest
import torch
from torch.testing import assert_close

from models import build_model
from tests.reference import reference_images, reference_weights
from util.nested_tensor import nested_tensor_from_tensor_list

transformers = pytest.importorskip("transformers")

# Patterns of their key names and what ours are called, in this order.
RENAMED = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.", lambda m: f"backbone.0.body.layer{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.input_projection", "input_proj"),
    (r"^model\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"decoder(.*)\.self_attn\.o_proj", r"decoder\1.self_attn.out_proj"),
    (r"decoder(.*)\.encoder_attn\.o_proj", r"decoder\1.cross_attn.out_proj"),
    (r"decoder(.*)\.self_attn\.([qk])_(content|pos)_proj", r"decoder\1.sa_\2\3_proj"),
    (r"decoder(.*)\.self_attn\.v_proj", r"decoder\1.sa_v_proj"),
    (r"decoder(.*)\.encoder_attn\.([qk])_(content|pos|pos_sine)_proj", r"decoder\1.ca_\2\3_proj"),
    (r"decoder(.*)\.encoder_attn\.v_proj", r"decoder\1.ca_v_proj"),
    (r"encoder(.*)\.o_proj", r"encoder\1.out_proj"),
    (r"\.mlp\.fc([12])", r".linear\1"),
    (r"decoder(.*)\.encoder_attn_layer_norm", r"decoder\1.norm2"),
    (r"\.self_attn_layer_norm", ".norm1"),
    (r"decoder(.*)\.final_layer_norm", r"decoder\1.norm3"),
    (r"encoder(.*)\.final_layer_norm", r"encoder\1.norm2"),
)


def our_tensor(key: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our weights under one of their keys; the encoder's three projections are one tensor here."""
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    if fused := re.fullmatch(r"(.*encoder.*\.self_attn\.)([qkv])_proj\.(weight|bias)", key):
        return weights[f"{fused[1]}in_proj_{fused[3]}"].chunk(3)["qkv".index(fused[2])]
    return weights[key]


def test_same_outputs_on_a_padded_batch(parse):
    config = transformers.ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
        num_labels=91,
    )
    theirs = transformers.ConditionalDetrForObjectDetection(config).eval()
    ours, _, _ = build_model(parse())
    weights = reference_weights(ours.state_dict())
    ours.load_state_dict(weights)
    ours.eval()
    theirs.load_state_dict({key: our_tensor(key, weights) for key in theirs.state_dict()})

    samples = nested_tensor_from_tensor_list(reference_images([(128, 160), (96, 192), (160, 64)], seed=3))
    with torch.no_grad():
        expected = theirs(pixel_values=samples.tensors, pixel_mask=(~samples.mask).long())
        outputs = ours(samples)
    assert_close(outputs["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    assert_close(outputs["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=0)
