"""The assignment of targets to queries (DETR, section 3.1; costs as in Conditional DETR, section 4.1).

Shapes: L decoder layers, B images, Q queries, K classes, T_b targets of image b.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError

GAMMA = 2  # of the focal loss


class HungarianMatcher:
    """Finds, for every decoder layer and image, the pairs of query and target with the least total cost.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the focal cost, of the L1 distance between normalised cxcywh boxes,
            and of the negative generalised IoU.
        focal_alpha: the focal loss's weight of positives.
    """

    def __init__(
        self, cost_class: float = 2, cost_bbox: float = 5, cost_giou: float = 2, focal_alpha: float = 0.25
    ) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise InputError("--set_cost_class, --set_cost_bbox and --set_cost_giou cannot all be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Logits [L, B, Q, K], boxes [L, B, Q, 4] and B targets (`labels` [T_b], `boxes` [T_b, 4]) to B index pairs.

        Each pair is (queries [L, min(Q, T_b)], targets [L, min(Q, T_b)]), int64 on the CPU, queries ascending. The
        costs of all layers and images leave the device in one transfer, each image's only for its own targets.
        """
        layers, _, queries, _ = logits.shape
        costs = [
            self.cost(logits[:, b].flatten(0, 1), boxes[:, b].flatten(0, 1), target["labels"], target["boxes"])
            for b, target in enumerate(targets)
        ]  # B × [L·Q, T_b]
        sizes = [cost.shape[1] for cost in costs]
        costs = torch.cat(costs, dim=1).view(layers, queries, -1).cpu()  # [L, Q, sum of T_b]
        costs = costs.nan_to_num(nan=torch.finfo(costs.dtype).max)  # a diverged model still has an assignment
        matches = []
        for cost in costs.split(sizes, dim=2):
            pairs = [linear_sum_assignment(layer) for layer in cost.numpy()]
            query, target = torch.from_numpy(np.array(pairs)).unbind(1)
            matches.append((query, target))
        return matches

    def cost(self, logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor) -> Tensor:
        """N predictions ([N, K], [N, 4]) and T targets ([T], [T, 4]) to the cost of every pair [N, T]."""
        p = logits.sigmoid()[:, target_labels]
        negative = (1 - self.focal_alpha) * p**GAMMA * -(1 - p + 1e-8).log()
        positive = self.focal_alpha * (1 - p) ** GAMMA * -(p + 1e-8).log()
        l1 = torch.cdist(boxes, target_boxes, p=1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return self.cost_class * (positive - negative) + self.cost_bbox * l1 - self.cost_giou * giou
