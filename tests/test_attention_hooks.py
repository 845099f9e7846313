"""Hooks that read attention weights, as DETR's notebooks set them."""

import re

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from evaluation.attention_maps import recorded
from tests.conftest import ROOT
from tests.small import build_small


def test_the_code_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    Image.new("RGB", (96, 64), "red").save("photo.jpg")
    load, draw = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention_maps.md").read_text(), re.S)
    load = load.replace('"."', repr(str(ROOT))).replace("pretrained=True", "pretrained=False")
    names = {}
    exec(load.replace("[800]", "[64]") + draw, names)
    assert names["dec_attn_weights"][0].shape == (1, 300, 2 * 3)
    assert names["sattn"].shape == (2, 3, 2, 3)
    assert not any(module._forward_hooks for module in names["model"].modules())
    assert Image.open("attention.png").size[0] > 400


@pytest.mark.parametrize("padded", [False, True])
def test_hooks_of_the_encoder_receive_the_same_as_those_of_multihead_attention(padded):
    model = build_small()[0].double()  # the activations of random weights are large
    attention = model.transformer.encoder.layers[0].self_attn
    published = nn.MultiheadAttention(attention.out_proj.in_features, attention.num_heads, batch_first=True).double()
    published.load_state_dict(attention.state_dict())
    with torch.no_grad(), recorded(attention, model.backbone[-2]) as calls:
        model([torch.rand(3, 64, size, dtype=torch.double) for size in (96, 64 if padded else 96)])
    (x, position, _), (output, weights) = calls[attention]
    mask = calls[model.backbone[-2]][1]["0"].mask.flatten(1)
    assert mask.any().item() is padded
    with torch.no_grad():
        expected = published(x + position, x + position, x, key_padding_mask=mask)
    assert_close((output, weights), expected)


def test_weights_are_computed_only_for_hooks():
    model, _ = build_small()
    attention = model.transformer.decoder.layers[-1].cross_attn
    inputs = [torch.rand(2, attention.num_heads, 4, attention.out_proj.in_features // attention.num_heads)] * 3
    with torch.no_grad(), recorded(attention):
        _, weights = attention(*inputs)
        assert_close(weights.sum(-1), torch.ones(2, 4))
    assert attention(*inputs)[1] is None
