"""Models of other sizes than the published ones, position embeddings, initialisation, and impossible flags."""

import math

import pytest
import torch
from torch.testing import assert_close

from models import build_model
from models.backbone import Backbone
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.postprocess import PostProcess
from tests.small import small_transformer
from util.errors import InputError
from util.nested_tensor import NestedTensor

SMALL = ("--backbone", "resnet18", "--enc_layers", 2, "--dec_layers", 3, "--dim_feedforward", 64, "--num_queries", 7)


@pytest.mark.parametrize(("dim", "heads"), [(4, 1), (36, 3), (64, 8), (288, 8)])
def test_a_model_can_have_any_width(dim, heads, parse):
    model, criterion, _ = build_model(parse(*SMALL, "--hidden_dim", dim, "--nheads", heads))
    outputs = model([torch.randn(3, 64, 96), torch.randn(3, 96, 64)])
    assert outputs["pred_boxes"].shape == (2, 7, 4)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    losses = criterion(outputs, targets)
    sum(losses[key] for key in criterion.weight_dict).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("enc_layers", "dec_layers"), [(0, 1), (1, 2), (3, 1)])
def test_a_model_can_have_any_depth(enc_layers, dec_layers, parse):
    model, criterion, _ = build_model(parse(*SMALL, "--enc_layers", enc_layers, "--dec_layers", dec_layers))
    outputs = model(torch.randn(1, 3, 64, 64))
    assert len(outputs["aux_outputs"]) == dec_layers - 1
    assert len(criterion.weight_dict) == 3 * dec_layers
    has_scale = any("query_scale" in key for key in model.state_dict())
    assert has_scale == (dec_layers > 1)


def test_no_aux_loss_keeps_only_the_last_layer(parse):
    model, criterion, _ = build_model(parse(*SMALL, "--no_aux_loss"))
    assert set(model(torch.randn(1, 3, 64, 64))) == {"pred_logits", "pred_boxes"}
    assert set(criterion.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_padded_cells_do_not_change_the_outputs():
    transformer = small_transformer(2, 3)
    x, position, queries = torch.randn(1, 9, 16), torch.randn(1, 9, 16), torch.randn(3, 16)
    padding = torch.arange(9)[None] >= 6
    with torch.no_grad():
        padded, *_ = transformer(x, position, padding, queries)
        cut, *_ = transformer(x[:, :6], position[:, :6], padding[:, :6], queries)
        all_seen, *_ = transformer(x, position, torch.zeros_like(padding), queries)
    assert_close(padded, cut)
    assert not torch.allclose(padded, all_seen)


def of_mask(mask: torch.Tensor) -> NestedTensor:
    """Return a feature map of which only the mask matters."""
    return NestedTensor(torch.zeros(mask[:, None].shape), mask)


def test_learned_positions_join_embeddings_of_column_and_row(parse):
    model, _, _ = build_model(parse(*SMALL, "--position_embedding", "learned"))
    assert model.state_dict()["backbone.1.row_embed.weight"].shape == (50, 128)
    assert model.state_dict()["backbone.1.col_embed.weight"].shape == (50, 128)
    embedding = PositionEmbeddingLearned(4)
    position = embedding(of_mask(torch.zeros(2, 3, 5, dtype=torch.bool)))
    assert position.shape == (2, 8, 3, 5)
    expected = torch.cat([embedding.col_embed.weight[4], embedding.row_embed.weight[2]])
    assert torch.equal(position[1, :, 2, 4], expected)
    assert embedding.row_embed.weight.min() >= 0 and embedding.row_embed.weight.max() <= 1
    with pytest.raises(InputError, match=r"--position_embedding learned has 50 .* 51×10"):
        embedding(of_mask(torch.zeros(1, 51, 10, dtype=torch.bool)))


def test_sine_positions_count_unpadded_cells():
    padding = torch.zeros(1, 2, 5, dtype=torch.bool)
    padding[:, :, 4:] = True
    position = PositionEmbeddingSine(4, normalize=True)(of_mask(padding))
    x = torch.tensor(2 / (4 + 1e-6) * 2 * math.pi)  # second of four columns
    assert_close(position[0, 4:, 0, 1], torch.stack([x.sin(), x.cos(), (x / 100).sin(), (x / 100).cos()]))
    y = torch.tensor(1 / (2 + 1e-6) * 2 * math.pi)
    assert_close(position[0, :2, 0, 1], torch.stack([y.sin(), y.cos()]))


def test_dilation_doubles_the_resolution():
    batch = NestedTensor(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert Backbone("resnet50")(batch)["0"].tensors.shape == (1, 2048, 2, 3)
    assert Backbone("resnet50", dilation=True)(batch)["0"].tensors.shape == (1, 2048, 4, 6)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ((), {"layer2", "layer3", "layer4"}),
        (("--lr_backbone", 0), set()),
        (("--backbone_weights", "none"), {"conv1", "layer1", "layer2", "layer3", "layer4"}),
        (("--backbone_norm", "batch"), {"layer2", "layer3", "layer4"}),
        (
            ("--backbone_weights", "none", "--backbone_norm", "batch"),
            {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
        ),
    ],
)
def test_flags_decide_which_part_of_the_backbone_is_trained(flags, trained, parse):
    model, _, _ = build_model(parse(*SMALL, *flags))
    body = model.backbone[0].body
    assert {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad} == trained
    norms = [key for key, _ in body.named_parameters() if "bn" in key]
    assert bool(norms) == ("batch" in flags)


def test_weights_are_initialised_as_published(parse):
    model, _, _ = build_model(parse("--backbone", "resnet18", "--enc_layers", 2, "--dec_layers", 3))
    state = model.state_dict()
    assert_close(model.class_embed.bias, torch.full((91,), -math.log(99)))
    assert not model.bbox_embed.layers[-1].weight.any() and not model.bbox_embed.layers[-1].bias.any()
    assert model.query_embed.weight.std().item() == pytest.approx(1, abs=0.02)
    prefix = "transformer.decoder.layers"
    for name in ("self_attn.out_proj.bias", "cross_attn.out_proj.bias"):
        assert not state[f"{prefix}.1.{name}"].any()
    assert not state["transformer.encoder.layers.1.self_attn.in_proj_bias"].any()
    assert torch.equal(state[f"{prefix}.0.ca_v_proj.bias"], state[f"{prefix}.2.ca_v_proj.bias"])
    assert state[f"{prefix}.0.ca_v_proj.bias"].any()
    assert not torch.equal(state[f"{prefix}.0.ca_v_proj.weight"], state[f"{prefix}.2.ca_v_proj.weight"])
    xavier = math.sqrt(6 / (256 + 2048))
    assert state[f"{prefix}.0.linear1.weight"].abs().max().item() == pytest.approx(xavier, rel=1e-3)
    assert state["transformer.encoder.layers.0.self_attn.in_proj_weight"].abs().max().item() == pytest.approx(
        math.sqrt(6 / (256 + 768)), rel=1e-3
    )


def test_there_are_at_most_as_many_detections_as_logits():
    outputs = {"pred_logits": torch.randn(1, 3, 2), "pred_boxes": torch.rand(1, 3, 4)}
    (detections,) = PostProcess()(outputs, torch.tensor([[10, 20]]))
    assert detections["scores"].shape == (6,)
    assert detections["boxes"].shape == (6, 4)
    assert (detections["scores"].diff() <= 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backbone", "vgg"), "--backbone vgg: choose one of"),
        (("--backbone", "resnet34", "--dilation"), "--dilation does not work with --backbone resnet34"),
        (("--hidden_dim", 100), "--hidden_dim 100 must be a multiple of 4 and of --nheads 8"),
        (("--hidden_dim", 6, "--nheads", 1), "--hidden_dim 6 must be"),
        (("--dec_layers", 0), "--dec_layers 0: must be at least 1"),
        (("--pre_norm",), "--pre_norm"),
        (("--set_cost_class", 0, "--set_cost_bbox", 0, "--set_cost_giou", 0), "cannot all be 0"),
    ],
)
def test_impossible_flags_are_refused(flags, message, parse):
    with pytest.raises(InputError, match=message):
        build_model(parse(*flags))


def test_dropout_acts_in_training_only():
    transformer = small_transformer(dropout=0.5)
    x, position = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    padding, queries = torch.zeros(1, 6, dtype=torch.bool), torch.randn(3, 16)
    first, second = (transformer(x, position, padding, queries)[0] for _ in range(2))
    assert not torch.equal(first, second)
    transformer.eval()
    first, second = (transformer(x, position, padding, queries)[0] for _ in range(2))
    assert torch.equal(first, second)
