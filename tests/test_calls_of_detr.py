"""Calls of DETR's own tests and notebooks, with its argument order and defaults."""

import argparse
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import hubconf
from models import build_model
from models.backbone import Backbone, Joiner
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine, build_position_encoding
from tests.conftest import TINY
from util import box_ops
from util.misc import NestedTensor, nested_tensor_from_tensor_list


def test_the_matcher_with_batched_single_and_empty_targets():
    """Without arguments, the matcher is DETR's: softmax over K + 1 logits, and costs of weight 1."""
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.rand(1, 30, 6, generator=generator), torch.rand(1, 30, 4, generator=generator)
    target = {"labels": torch.randint(5, (7,), generator=generator), "boxes": torch.rand(7, 4, generator=generator)}
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    matcher = HungarianMatcher()
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    ((queries, rows),) = matcher(outputs, [target])
    assert sorted(rows.tolist()) == list(range(7)) and len(set(queries.tolist())) == 7

    twice = {name: value.repeat(2, 1, 1) for name, value in outputs.items()}
    for targets, sizes in (([target] * 2, (7, 7)), ([target, empty], (7, 0)), ([empty] * 2, (0, 0))):
        pairs = matcher(twice, targets)
        assert [len(queries) for queries, _ in pairs] == list(sizes)
        for (found, found_rows), size in zip(pairs, sizes, strict=True):
            if size:
                assert torch.equal(found, queries) and torch.equal(found_rows, rows)

    l1 = torch.cdist(boxes[0], target["boxes"], p=1)
    giou = box_ops.generalized_box_iou(*map(box_ops.box_cxcywh_to_xyxy, (boxes[0], target["boxes"])))
    cost = l1 - logits[0].softmax(-1)[:, target["labels"]] - giou
    drawn = [torch.randperm(30, generator=generator)[:7] for _ in range(200)]
    total = cost[queries, rows].sum()
    assert all(total <= cost[other, torch.arange(7)].sum() for other in drawn)


def test_a_backbone_and_its_joiner():
    batch = nested_tensor_from_tensor_list([torch.rand(3, 64, 96), torch.rand(3, 64, 64)])
    last = Backbone("resnet18", True, False, False)
    assert [(name, x.tensors.shape) for name, x in last(batch).items()] == [("0", (2, 512, 2, 3))]
    assert {name.split(".")[1] for name, p in last.named_parameters() if p.requires_grad} == {
        "layer2",
        "layer3",
        "layer4",
    }
    frozen = Backbone("resnet50", False, True, True)
    assert not any(p.requires_grad for p in frozen.parameters())
    joiner = Joiner(frozen, PositionEmbeddingSine(8, normalize=True))
    assert joiner.num_channels == frozen.num_channels == 2048
    features, positions = joiner(batch)
    shapes = [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 4, 6)]
    assert [x.tensors.shape[1:] for x in features] == shapes
    assert [x.shape for x in positions] == [(2, 16, *shape[1:]) for shape in shapes]
    assert [x.mask[1].any(0).sum() for x in features] == [8, 4, 2, 2]


def test_position_encodings():
    cells = NestedTensor(torch.zeros(1, 1, 2, 3), torch.tensor([[[False, False, True]] * 2]))
    positions = PositionEmbeddingSine()(cells)
    assert positions.shape == (1, 128, 2, 3)
    frequencies = 10_000 ** -(torch.arange(0, 64, 2) / 64)
    for first, coordinate in ((0, 2.0), (64, 1.0)):  # features of the row, then of the column, both counted from 1
        assert_close(positions[0, first : first + 64 : 2, 1, 0], (coordinate * frequencies).sin())
        assert_close(positions[0, first + 1 : first + 64 : 2, 1, 0], (coordinate * frequencies).cos())
    scaled = PositionEmbeddingSine(64, 20, True, math.pi)(cells)
    frequencies = 20 ** -(torch.arange(0, 64, 2) / 64)
    assert_close(scaled[0, 64::2, 1, 0], (math.pi / (2 + 1e-6) * frequencies).sin())
    with pytest.raises(ValueError, match="scale=1 has no effect: pass normalize=True with it"):
        PositionEmbeddingSine(scale=1)

    learned = PositionEmbeddingLearned()
    assert learned(cells).shape == (1, 512, 2, 3)
    assert torch.equal(
        learned(cells)[0, :, 1, 2], torch.cat([learned.col_embed.weight[2], learned.row_embed.weight[1]])
    )


@pytest.mark.parametrize("kind", ["sine", "v2", "learned", "v3"])
def test_position_encodings_from_flags(kind):
    embedding = build_position_encoding(argparse.Namespace(hidden_dim=64, position_embedding=kind))
    assert isinstance(embedding, PositionEmbeddingSine if kind in ("sine", "v2") else PositionEmbeddingLearned)
    cells = NestedTensor(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool))
    assert embedding(cells).shape == (1, 64, 2, 3)


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_a_model_takes_three_kinds_of_samples(name, parse):
    model = build_model(parse(*TINY, "--model", name))[0].eval()
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        expected = model(image[None])
        for samples in ([image], nested_tensor_from_tensor_list([image])):
            outputs = model(samples)
            for key in ("pred_logits", "pred_boxes"):
                assert_close(outputs[key], expected[key], atol=1e-6, rtol=0)
        different = [torch.rand(3, 64, 64), image]
        nested, listed = model(nested_tensor_from_tensor_list(different)), model(different)
    assert nested["pred_boxes"].shape == (2, 8, 4)
    assert torch.equal(nested["pred_boxes"], listed["pred_boxes"])
    assert_close(nested["pred_boxes"][1], expected["pred_boxes"][0], atol=1e-5, rtol=0)


NAMES = ["pred_logits", "pred_boxes"]


def assert_exported(file: io.BytesIO | Path, model: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Compare ONNX Runtime's outputs with PyTorch's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    source = file.getvalue() if isinstance(file, io.BytesIO) else file
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    for shape in shapes:
        images = torch.rand(shape)
        with torch.no_grad():
            expected = model(images)
        for name, value in zip(NAMES, session.run(NAMES, {"inputs": images.numpy()}), strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-4)


def test_a_hub_model_is_exported_to_onnx():
    """The tracing exporter is called with DETR's arguments."""
    model = hubconf.detr_resnet50()
    file = io.BytesIO()
    fixed = {"dynamo": False, "do_constant_folding": True, "opset_version": 12}
    torch.onnx.export(model, (torch.rand(1, 3, 96, 128),), file, input_names=["inputs"], output_names=NAMES, **fixed)
    assert_exported(file, model, (1, 3, 96, 128))


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_model_is_exported_to_onnx_with_dynamic_sizes(name, dynamo, parse, tmp_path):
    """Files of both exporters take other batch sizes and image sizes."""
    if dynamo:
        pytest.importorskip("onnxscript")
    flags = ("--backbone_norm", "frozen", "--backbone", "resnet34", "--no_aux_loss", "--model", name)
    model = build_model(parse(*TINY, *flags))[0].eval()
    axes = {0: "batch", 2: "height", 3: "width"}
    free = {"dynamic_shapes": {"samples": axes}} if dynamo else {"dynamic_axes": {"inputs": axes}, "opset_version": 12}
    file = tmp_path / "model.onnx"
    example = (torch.rand(2, 3, 96, 128),)
    torch.onnx.export(model, example, file, input_names=["inputs"], output_names=NAMES, dynamo=dynamo, **free)
    assert_exported(file, model, (1, 3, 96, 128), (2, 3, 64, 160))


class Wrapped(nn.Module):
    """A module of a user, which contains a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor):
        return self.model(images)


def test_scripting_is_refused_in_one_line(parse):
    model, criterion, postprocessors = build_model(parse(*TINY, "--model", "detr"))
    parts = (*model.children(), model.backbone[0], PositionEmbeddingSine(), PositionEmbeddingLearned(), criterion)
    ours = [part for part in parts if not type(part).__module__.startswith("torch.")]
    for module in (model, Wrapped(model), postprocessors["bbox"], *ours):
        with pytest.raises(NotImplementedError) as error:
            torch.jit.script(module)
        message = str(error.value)
        assert message.startswith("torch.jit.script is deprecated and does not support ")
        assert "\n" not in message


def test_box_overlaps():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    iou, union = box_ops.box_iou(boxes, boxes[1:])
    assert_close(union, torch.tensor([[7.0], [4.0]]))
    assert_close(iou, torch.tensor([[1 / 7], [1.0]]))
    assert_close(box_ops.generalized_box_iou(boxes, boxes[1:]), torch.tensor([[1 / 7 - 2 / 9], [1.0]]))
    masks = torch.zeros(1, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    assert box_ops.masks_to_boxes(masks).tolist() == [[2, 1, 4, 2]]
