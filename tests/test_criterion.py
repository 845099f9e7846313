"""Matching and losses where batches are unusual."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou

from models.criterion import SetCriterion
from models.matcher import HungarianMatcher
from util.box_ops import box_cxcywh_to_xyxy, inverse_sigmoid, paired_generalized_box_iou

WEIGHTS = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}


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


def make_criterion(**kwargs) -> SetCriterion:
    return SetCriterion(HungarianMatcher(**kwargs), WEIGHTS, num_layers=2)


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


def test_an_empty_image_beside_a_full_one_counts_by_boxes():
    outputs = make_outputs(2)
    both = make_criterion()(outputs, [make_target(1, 2), make_target()])
    first = {key: value[:1] for key, value in outputs.items() if key != "aux_outputs"}
    alone = make_criterion()(first, [make_target(1, 2)])
    assert_close(both["loss_bbox"], alone["loss_bbox"])
    assert_close(both["loss_giou"], alone["loss_giou"])
    assert both["loss_ce"] > alone["loss_ce"]


def test_more_targets_than_queries():
    outputs, target = make_outputs(1, queries=3), make_target(1, 2, 3, 1, 2)
    (pairs,) = HungarianMatcher()(outputs["pred_logits"][None], outputs["pred_boxes"][None], [target])
    assert pairs[0].tolist() == [[0, 1, 2]]
    assert len(set(pairs[1][0].tolist())) == 3
    assert torch.isfinite(make_criterion()(outputs, [target])["loss_bbox"])


def test_matching_finds_the_planted_pairs():
    target = make_target(3, 1)
    logits, boxes = torch.full((1, 1, 5, 4), -4.0), torch.full((1, 1, 5, 4), 0.9)
    for query, row in ((4, 0), (2, 1)):
        boxes[0, 0, query] = target["boxes"][row]
        logits[0, 0, query, target["labels"][row]] = 4
    ((queries, rows),) = HungarianMatcher()(logits, boxes, [target])
    assert queries.tolist() == [[2, 4]]
    assert rows.tolist() == [[1, 0]]


def test_losses_of_one_pair_by_hand():
    logits = torch.tensor([[[0.3, -1.2]]])
    box, target_box = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), torch.tensor([[0.4, 0.6, 0.2, 0.2]])
    losses = SetCriterion(HungarianMatcher(), WEIGHTS)(
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


def test_focal_alpha_reaches_loss_and_matching():
    outputs, targets = make_outputs(1), [make_target(1)]
    losses = [
        SetCriterion(HungarianMatcher(focal_alpha=a), WEIGHTS, focal_alpha=a)(outputs, targets)["loss_ce"]
        for a in (0.25, 0.75)
    ]
    assert losses[0] != losses[1]
    logits, boxes = torch.randn(1, 2, 6), torch.rand(1, 2, 6, 4)
    costs = [HungarianMatcher(focal_alpha=a).cost(logits, boxes, targets[0]["boxes"]) for a in (0.25, 0.75)]
    assert not torch.equal(*costs)


def test_paired_giou_is_the_diagonal_of_the_table():
    corners = torch.rand(2, 5, 2, 2).sort(dim=2).values.flatten(2)
    assert_close(paired_generalized_box_iou(*corners), generalized_box_iou(*corners).diag())
    assert paired_generalized_box_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 1.0])
def test_inverse_sigmoid(value):
    x = torch.tensor(value)
    assert_close(inverse_sigmoid(x).sigmoid(), x, atol=1.1e-5, rtol=0)
