"""Matching and losses, also of unusual batches."""

from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou

from models.classification import FocalSigmoid, SoftmaxWithNoObject
from models.criterion import BoxLoss, CardinalityError, ClassError, ClassLoss, SetCriterion
from models.matcher import HungarianMatcher
from util.box_ops import box_cxcywh_to_xyxy, inverse_sigmoid, paired_generalized_box_iou

MATCHER = HungarianMatcher(2, 5, 2, FocalSigmoid())


def make_outputs(batch: int, queries: int = 6, classes: int = 4, aux_layers: int = 1) -> dict:
    generator = torch.Generator().manual_seed(0)

    def layer() -> dict:
        return {
            "pred_logits": torch.randn(batch, queries, classes, generator=generator, requires_grad=True),
            "pred_boxes": (torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.2).requires_grad_(),
        }

    return layer() | {"aux_outputs": [layer() for _ in range(aux_layers)]}


def make_target(*labels: int) -> dict:
    boxes = torch.rand(len(labels), 4, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.2
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


def make_criterion(num_layers: int = 2, alpha: float = 0.25) -> SetCriterion:
    classification = FocalSigmoid(alpha)
    terms = [ClassLoss(classification, 2), BoxLoss(5, 2), CardinalityError(), ClassError()]
    return SetCriterion(HungarianMatcher(2, 5, 2, classification), terms, num_layers)


def test_a_batch_without_boxes_still_has_gradients():
    outputs = make_outputs(2)
    losses = make_criterion()(outputs, [make_target(), make_target()])
    assert losses["class_error"] == 100
    for suffix in ("", "_0"):
        assert losses["loss_bbox" + suffix] == losses["loss_giou" + suffix] == 0
        assert losses["loss_ce" + suffix] > 0
    sum(losses[name] * weight for name, weight in make_criterion().weight_dict.items()).backward()
    assert outputs["pred_logits"].grad.any()
    assert not outputs["pred_boxes"].grad.any()


def test_an_image_without_boxes_adds_to_the_class_loss_only():
    outputs = make_outputs(2)
    both = make_criterion()(outputs, [make_target(1, 2), make_target()])
    first = {key: value[:1] for key, value in outputs.items() if key != "aux_outputs"}
    alone = make_criterion()(first, [make_target(1, 2)])
    assert_close(both["loss_bbox"], alone["loss_bbox"])
    assert_close(both["loss_giou"], alone["loss_giou"])
    assert both["loss_ce"] > alone["loss_ce"]


def test_every_query_is_matched_if_there_are_more_targets_than_queries():
    outputs, target = make_outputs(1, queries=3), make_target(1, 2, 3, 1, 2)
    matches = MATCHER.match(outputs["pred_logits"][None], outputs["pred_boxes"][None], [target])
    assert matches.query.tolist() == [[0, 1, 2]]
    assert len(set(matches.target[0].tolist())) == 3
    assert torch.isfinite(make_criterion()(outputs, [target])["loss_bbox"])


def test_matching_finds_the_planted_pairs():
    target = make_target(3, 1)
    logits, boxes = torch.full((1, 1, 5, 4), -4.0), torch.full((1, 1, 5, 4), 0.9)
    for query, row in ((4, 0), (2, 1)):
        boxes[0, 0, query] = target["boxes"][row]
        logits[0, 0, query, target["labels"][row]] = 4
    matches = MATCHER.match(logits, boxes, [target])
    assert matches.query.tolist() == [[2, 4]]
    assert matches.target.tolist() == [[1, 0]]


def test_matches_index_the_predictions_and_targets_of_all_images():
    targets = [make_target(1), make_target(), make_target(2, 0)]
    outputs = make_outputs(3)
    layers = [outputs, *outputs["aux_outputs"]]
    logits, boxes = (torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes"))
    together = MATCHER.match(logits, boxes, targets)
    assert together.layer.tolist() == [[0] * 3, [1] * 3]
    assert together.image.tolist() == [[0, 2, 2]] * 2
    for image, rows in ((0, slice(0, 1)), (2, slice(1, 3))):
        alone = MATCHER.match(logits[:, image, None], boxes[:, image, None], [targets[image]])
        assert torch.equal(together.query[:, rows], alone.query)
        assert torch.equal(together.target[:, rows], alone.target + rows.start)


def test_losses_of_one_pair_match_a_calculation_by_hand():
    logits = torch.tensor([[[0.3, -1.2]]])
    box, target_box = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), torch.tensor([[0.4, 0.6, 0.2, 0.2]])
    losses = make_criterion(num_layers=1)(
        {"pred_logits": logits, "pred_boxes": box}, [{"labels": torch.tensor([1]), "boxes": target_box}]
    )
    p = logits.sigmoid()[0, 0]
    focal = 0.75 * p[0] ** 2 * -(1 - p[0]).log() + 0.25 * (1 - p[1]) ** 2 * -p[1].log()
    giou = generalized_box_iou(box_cxcywh_to_xyxy(box[0]), box_cxcywh_to_xyxy(target_box))
    assert_close(losses["loss_ce"], focal)
    assert_close(losses["loss_bbox"], torch.tensor(0.4))
    assert_close(losses["loss_giou"], 1 - giou[0, 0])
    assert losses["class_error"] == 100
    assert losses["cardinality_error"] == 0  # the highest class is 0, so one object is counted


def test_focal_alpha_changes_the_loss_and_the_matching_cost():
    outputs, targets = make_outputs(1), [make_target(1)]
    losses = [make_criterion(alpha=alpha)(outputs, targets)["loss_ce"] for alpha in (0.25, 0.75)]
    assert losses[0] != losses[1]
    logits, image, labels = torch.randn(2, 1, 6, 4), torch.tensor([0, 0]), torch.tensor([3, 1])
    costs = [FocalSigmoid(alpha).cost(logits, image, labels) for alpha in (0.25, 0.75)]
    assert costs[0].shape == (2, 2, 6)
    assert not torch.equal(*costs)


def test_paired_giou_is_the_diagonal_of_the_giou_matrix():
    corners = torch.rand(2, 5, 2, 2).sort(dim=2).values.flatten(2)
    assert_close(paired_generalized_box_iou(*corners), generalized_box_iou(*corners).diag())
    assert paired_generalized_box_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 1.0])
def test_inverse_sigmoid_inverts_the_sigmoid(value):
    x = torch.tensor(value)
    assert_close(inverse_sigmoid(x).sigmoid(), x, atol=1.1e-5, rtol=0)


class TestDetrsMatcher:
    """The matcher, called as in DETR's tests: without arguments, and with the model's outputs."""

    outputs: ClassVar = {"pred_logits": torch.rand(1, 100, 92), "pred_boxes": torch.rand(1, 100, 4)}

    def test_every_target_of_one_image_is_matched(self):
        target = {"labels": torch.randint(91, (15,)), "boxes": torch.rand(15, 4)}
        ((queries, rows),) = HungarianMatcher()(self.outputs, [target])
        assert queries.tolist() == sorted(queries.tolist()) and sorted(rows.tolist()) == list(range(15))

    def test_images_with_one_target_or_none_are_matched(self):
        targets = [{"labels": torch.randint(91, (n,)), "boxes": torch.rand(n, 4)} for n in (1, 0, 15)]
        outputs = {key: value.repeat(3, 1, 1) for key, value in self.outputs.items()}
        pairs = HungarianMatcher()(outputs, targets)
        assert [(len(queries), len(rows)) for queries, rows in pairs] == [(1, 1), (0, 0), (15, 15)]
        assert sorted(pairs[2][1].tolist()) == list(range(15))
        ((queries, rows),) = HungarianMatcher()(self.outputs, targets[1:2])
        assert len(queries) == len(rows) == 0


def test_cross_entropy_is_the_weighted_mean_of_the_step():
    """One batch has the cross-entropy that torch computes; two batches of a step share the sum of the weights."""
    classification, layers = SoftmaxWithNoObject(0.1), make_outputs(4, queries=6, classes=5, aux_layers=0)
    targets = [make_target(1, 2), make_target(), make_target(0), make_target(*[3] * 8)]
    terms = [ClassLoss(classification, 1), BoxLoss(5, 2), CardinalityError(), ClassError()]
    criterion = SetCriterion(HungarianMatcher(1, 5, 2, classification), terms)
    loss = criterion(layers, targets)["loss_ce"]
    classes = torch.full((4, 6), 4)
    for image, (queries, rows) in enumerate(criterion.matcher(layers, targets)):
        classes[image, queries] = targets[image]["labels"][rows]
    weights = torch.tensor([1, 1, 1, 1, 0.1])
    assert_close(loss, torch.nn.functional.cross_entropy(layers["pred_logits"].transpose(1, 2), classes, weights))

    totals = criterion.totals(targets, torch.device("cpu"))
    parts = [{key: layers[key][i : i + 2] for key in ("pred_logits", "pred_boxes")} for i in (0, 2)]
    halves = [criterion(part, targets[i : i + 2], totals)["loss_ce"] for part, i in zip(parts, (0, 2), strict=True)]
    assert_close(sum(halves), loss)
