"""The training losses (DETR, section 3.1, with the focal loss of Conditional DETR, section 4.1).

Shapes: L decoder layers, B images, Q queries, K classes, M matched pairs of a batch (the same number in every layer).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from models.matcher import GAMMA, HungarianMatcher, copy_to_device
from util.box_ops import box_cxcywh_to_xyxy, paired_generalized_box_iou
from util.distributed import get_world_size, reduce_sum


class SetCriterion(nn.Module):
    """Matches every decoder layer's predictions with the targets and measures how well they agree.

    Args:
        matcher: assigns targets to queries.
        loss_weights: the weights of `loss_ce`, `loss_bbox` and `loss_giou` in the total loss.
        num_layers: how many decoder layers the outputs hold; 1 without auxiliary outputs.
        focal_alpha: the focal loss's weight of positives.

    `weight_dict` holds the weight of every loss by name. The last layer's losses have the plain names, those of the
    earlier layers i the suffix `_i`. The host waits for the device once, for the costs of the matching.
    """

    def __init__(
        self, matcher: HungarianMatcher, loss_weights: dict[str, float], num_layers: int = 1, focal_alpha: float = 0.25
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.focal_alpha = focal_alpha
        self.weight_dict = {
            name + s: weight for s in layer_suffixes(num_layers) for name, weight in loss_weights.items()
        }

    def forward(
        self, outputs: dict, targets: list[dict[str, Tensor]], num_boxes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the model and B targets (`labels` [T_b], `boxes` [T_b, 4] normalised cxcywh) to scalars by name.

        `num_boxes` divides the losses: `mean_num_boxes` of all batches of a step, by default that of this one.
        `loss_*` are unweighted; `class_error` and `cardinality_error` are for the log only.
        """
        layers = [outputs, *outputs.get("aux_outputs", [])]  # the last decoder layer first
        logits = torch.stack([layer["pred_logits"] for layer in layers])  # [L, B, Q, K]
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])  # [L, B, Q, 4]
        matches = self.matcher(logits, boxes, targets)
        pairs, rows = self.matched_index(matches, targets, logits.device)
        matched_boxes = boxes[pairs]  # [L, M, 4]
        labels = torch.cat([t["labels"] for t in targets])[rows]  # [L, M]
        target_boxes = torch.cat([t["boxes"] for t in targets])[rows]  # [L, M, 4]
        num_boxes = self.mean_num_boxes(targets, logits.device) if num_boxes is None else num_boxes

        by_layer = {
            "loss_ce": self.loss_labels(logits, pairs, labels) / num_boxes,
            "loss_bbox": (matched_boxes - target_boxes).abs().sum((1, 2)) / num_boxes,
            "loss_giou": self.loss_giou(matched_boxes, target_boxes) / num_boxes,
            "cardinality_error": self.cardinality_error(logits.detach(), targets),
        }
        losses = {
            name + suffix: values[i]
            for i, suffix in enumerate(layer_suffixes(len(layers)))
            for name, values in by_layer.items()
        }
        losses["class_error"] = self.class_error(logits.detach()[pairs][0], labels[0])
        return losses

    @staticmethod
    def matched_index(
        matches: list[tuple[Tensor, Tensor]], targets: list[dict[str, Tensor]], device: torch.device
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The matches of B images as (layer, image, query), which indexes [L, B, Q, ..], and as rows of all targets.

        Each index is [L, M]; all travel to the device in one copy.
        """
        queries, rows, images, offset = [], [], [], 0
        for image, ((query, row), target) in enumerate(zip(matches, targets, strict=True)):
            queries.append(query)
            rows.append(row + offset)
            images.append(torch.full_like(query, image))
            offset += len(target["labels"])
        index = torch.stack([torch.cat(parts, dim=1) for parts in (images, queries, rows)])  # [3, L, M]
        image, query, row = copy_to_device(index, device)
        layer = torch.arange(len(query), device=device)[:, None].expand_as(query)
        return (layer, image, query), row

    def loss_labels(self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """Sigmoid focal loss over all queries and classes, [L]."""
        one_hot = torch.zeros_like(logits)
        one_hot.index_put_((*pairs, labels), one_hot.new_ones(()))  # of a plain 1, the host would wait for the copy
        return sigmoid_focal_loss(logits, one_hot, alpha=self.focal_alpha, gamma=GAMMA).sum((1, 2, 3))

    @staticmethod
    def loss_giou(boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """1 - GIoU summed over the matched pairs, [L]."""
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return (1 - giou).sum(1)

    @staticmethod
    def class_error(matched_logits: Tensor, labels: Tensor) -> Tensor:
        """Per cent of the matched pairs [M, K], [M] whose highest class is wrong; 100 where there is no pair."""
        if len(labels) == 0:
            return matched_logits.new_full((), 100.0)
        return 100 * (matched_logits.argmax(-1) != labels).float().mean()

    @staticmethod
    def cardinality_error(logits: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Mean difference between the number of targets and of queries whose highest class is not the last, [L].

        DETR's count of predicted objects; with sigmoid classes, which have no background, it says little.
        """
        counts = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)  # [L, B]
        num_targets = copy_to_device(torch.tensor([len(t["labels"]) for t in targets]), logits.device)  # [B]
        return (counts - num_targets).abs().float().mean(-1)

    @staticmethod
    def mean_num_boxes(targets: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """The targets of the batch, averaged over the processes; at least 1."""
        num_boxes = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)
        return (reduce_sum(num_boxes) / get_world_size()).clamp(min=1)


def layer_suffixes(num_layers: int) -> list[str]:
    """The suffixes of loss names: none for the last decoder layer, then `_0`, `_1`, .. for those before it."""
    return ["", *(f"_{i}" for i in range(num_layers - 1))]
