"""Calls of DETR's own tests and notebooks, with its argument order and defaults."""

import io
import math

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
    """Without arguments it is DETR's: softmax over K + 1 logits, and costs of weight 1."""
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


@pytest.mark.parametrize(("kind", "expected"), [("sine", 64), ("v2", 64), ("learned", 64), ("v3", 64)])
def test_position_encodings_from_flags(kind, expected, parse):
    embedding = build_position_encoding(parse("--hidden_dim", 64, "--position_embedding", "sine"))
    args = parse("--hidden_dim", 64)
    args.position_embedding = kind
    embedding = build_position_encoding(args)
    cells = NestedTensor(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool))
    assert embedding(cells).shape == (1, expected, 2, 3)


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
        several = model(nested_tensor_from_tensor_list([torch.rand(3, 64, 64), torch.rand(3, 64, 80)]))
    assert several["pred_boxes"].shape == (2, 8, 4)


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_a_model_goes_to_onnx(name, parse):
    """Traced on one image tensor; with dynamic axes, the file takes images of other sizes and numbers."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if name == "detr":
        model = hubconf.detr_resnet50(pretrained=False)
    else:
        flags = parse(*TINY, "--backbone_norm", "frozen", "--no_aux_loss")
        model = build_model(flags)[0].eval()
    file = io.BytesIO()
    names = ["pred_logits", "pred_boxes"]
    torch.onnx.export(
        model,
        (torch.rand(1, 3, 96, 128),),
        file,
        dynamo=False,
        do_constant_folding=True,
        input_names=["inputs"],
        output_names=names,
        dynamic_axes={"inputs": {0: "batch", 2: "height", 3: "width"}},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 96, 128), (2, 3, 64, 160)):
        images = torch.rand(shape)
        found = session.run(names, {"inputs": images.numpy()})
        with torch.no_grad():
            expected = model(images)
        for name, value in zip(names, found, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-4)


class Wrapped(nn.Module):
    """A model within a module of the user's own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor):
        return self.model(images)


def test_scripting_is_refused_in_one_line(parse):
    model, *_ = build_model(parse(*TINY, "--model", "detr"))
    parts = (model.backbone, model.backbone[0], PositionEmbeddingSine(), PositionEmbeddingLearned())
    for module in (model, Wrapped(model), *parts):
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
