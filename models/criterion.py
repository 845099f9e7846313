"""The training losses (DETR, section 3.1): one matching, and terms that compare the matched pairs.

Shapes: L decoder layers, B images, Q queries, K logits, T targets of all images, M matched pairs per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.classification import Classification, Totals
from models.matcher import HungarianMatcher, Matches, copy_to_device
from models.not_scriptable import NotScriptable
from util.box_ops import box_cxcywh_to_xyxy, paired_generalized_box_iou
from util.distributed import get_world_size, reduce_sum


@dataclass
class Matched:
    """Predictions and targets of a batch, and the matched pairs.

    logits: [L, B, Q, K]; boxes: [L, B, Q, 4]; layer 0 is the decoder's last.
    outputs: the model's output dict for the last layer, with the outputs of further heads.
    targets: the dicts of the B images.
    matches: the matched pairs.
    totals: the numbers of targets of the step, by which losses are divided.
    """

    logits: Tensor
    boxes: Tensor
    outputs: dict[str, Any]
    targets: list[dict[str, Tensor]]
    matches: Matches
    totals: Totals

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Layer, image and query of the matched pairs, [L, M] each: an index of predictions [L, B, Q, ..]."""
        return self.matches.layer, self.matches.image, self.matches.query

    def last_layer_by_image(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each image, the last layer's matched queries and the indices of their targets in the image."""
        queries, rows = (
            of_all[0].split(self.matches.per_image) for of_all in (self.matches.query, self.matches.target)
        )
        before = accumulate((len(target["labels"]) for target in self.targets), initial=0)
        return list(queries), [row - first for row, first in zip(rows, before, strict=False)]

    @cached_property
    def labels(self) -> Tensor:
        """Classes of the matched targets, [L, M]."""
        return torch.cat([target["labels"] for target in self.targets])[self.matches.target]


class Term(Protocol):
    """Term of the criterion: returns losses by name, [L] for all layers, or [] for the last layer only.

    `weights` are the weights of its losses in the total; losses without a weight are only logged.
    """

    @property
    def weights(self) -> dict[str, float]: ...

    def __call__(self, matched: Matched) -> dict[str, Tensor]: ...


class ClassLoss:
    """`loss_ce`, as the classification defines it."""

    def __init__(self, classification: Classification, weight: float) -> None:
        self.classification = classification
        self.weights = {"loss_ce": weight}

    def __call__(self, matched: Matched) -> dict[str, Tensor]:
        return {"loss_ce": self.classification.loss(matched.logits, matched.pairs, matched.labels, matched.totals)}


class BoxLoss:
    """`loss_bbox`, the L1 distance of cxcywh boxes, and `loss_giou`, 1 - GIoU, of the matched pairs."""

    def __init__(self, bbox_weight: float, giou_weight: float) -> None:
        self.weights = {"loss_bbox": bbox_weight, "loss_giou": giou_weight}

    def __call__(self, matched: Matched) -> dict[str, Tensor]:
        boxes = matched.boxes[matched.pairs]  # [L, M, 4]
        target_boxes = torch.cat([target["boxes"] for target in matched.targets])[matched.matches.target]  # [L, M, 4]
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return {
            "loss_bbox": (boxes - target_boxes).abs().sum((1, 2)) / matched.totals.num_boxes,
            "loss_giou": (1 - giou).sum(1) / matched.totals.num_boxes,
        }


class CardinalityError:
    """`cardinality_error`: the mean absolute difference between the numbers of predicted objects and of targets.

    DETR counts queries as objects if their highest logit is not the last one. This means little for sigmoid classes,
    which have no background.
    """

    weights: ClassVar[dict[str, float]] = {}

    @torch.no_grad()
    def __call__(self, matched: Matched) -> dict[str, Tensor]:
        logits = matched.logits
        counts = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # [L, B]
        num_targets = torch.tensor([len(target["labels"]) for target in matched.targets])  # [B]
        num_targets = copy_to_device(num_targets, logits.device)
        return {"cardinality_error": (counts - num_targets).abs().float().mean(-1)}


class ClassError:
    """`class_error`: percentage of the last layer's pairs with a wrong class; 100 if there are no pairs."""

    weights: ClassVar[dict[str, float]] = {}

    @torch.no_grad()
    def __call__(self, matched: Matched) -> dict[str, Tensor]:
        logits, labels = matched.logits[matched.pairs][0], matched.labels[0]  # [M, K], [M]
        if len(labels) == 0:
            return {"class_error": logits.new_full((), 100.0)}
        return {"class_error": 100 * (logits.argmax(-1) != labels).float().mean()}


class SetCriterion(NotScriptable, nn.Module):
    """Criterion that matches every decoder layer's predictions with the targets, and applies terms to the pairs.

    Args:
        matcher: assigns targets to queries.
        terms: the losses, and values that are only logged.
        num_layers: the number of decoder layers in the outputs; 1 without auxiliary outputs.
        num_groups: the number of groups of queries in training mode; each group is matched with all targets.

    `weight_dict` has the weight of every loss by name. The last layer's losses have the plain names, those of each
    earlier layer i have the suffix `_i`. The host waits for the device once, for the costs of the matching.
    """

    def __init__(
        self, matcher: HungarianMatcher, terms: Sequence[Term], num_layers: int = 1, num_groups: int = 1
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_groups = num_groups
        self.terms = terms
        weights = {name: weight for term in terms for name, weight in term.weights.items()}
        self.weight_dict = {name + suffix: w for suffix in layer_suffixes(num_layers) for name, w in weights.items()}

    def forward(
        self, outputs: dict, targets: list[dict[str, Tensor]], totals: Totals | None = None
    ) -> dict[str, Tensor]:
        """Return scalars by name for the model's outputs and B targets.

        Targets have `labels` [T_b] and `boxes` [T_b, 4], normalised cxcywh. The losses are divided by `totals`, by
        default those of this batch; the number of boxes is multiplied by the number of groups, and is at least 1.
        `loss_*` are unweighted; `class_error` and `cardinality_error` are only logged.
        """
        layers = [outputs, *outputs.get("aux_outputs", [])]  # the last decoder layer first
        logits = torch.stack([layer["pred_logits"] for layer in layers])
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])
        num_groups = self.num_groups if self.training else 1
        num_boxes, per_image = totals or self.totals(targets, logits.device)
        totals = Totals((num_groups * num_boxes).clamp(min=1), per_image)
        matches = self.matcher.match(logits, boxes, targets, num_groups)
        matched = Matched(logits, boxes, outputs, targets, matches, totals)
        values = {name: value for term in self.terms for name, value in term(matched).items()}
        by_layer = {name: value.unbind() for name, value in values.items() if value.dim()}
        losses = {
            name + suffix: of_layers[i]
            for i, suffix in enumerate(layer_suffixes(len(layers)))
            for name, of_layers in by_layer.items()
        }
        return losses | {name: value for name, value in values.items() if not value.dim()}

    @staticmethod
    def totals(targets: list[dict[str, Tensor]], device: torch.device) -> Totals:
        """Return the numbers of targets of a batch."""
        per_image = [len(target["labels"]) for target in targets]
        num_boxes = reduce_sum(torch.full((), float(sum(per_image)), device=device)) / get_world_size()
        return Totals(num_boxes, per_image)


def layer_suffixes(num_layers: int) -> list[str]:
    """Return the suffixes of loss names: none for the last decoder layer, then `_0`, `_1`, .. for those before it."""
    return ["", *(f"_{i}" for i in range(num_layers - 1))]
