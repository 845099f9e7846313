"""The assignment of targets to queries (DETR, section 3.1; costs as in Conditional DETR, section 4.1).

Shapes: L decoder layers, B images, Q queries, K classes, T_b targets of image b, T targets of all images.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from util.box_ops import box_cxcywh_to_xyxy, paired_generalized_box_iou
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
        sizes = [len(target["labels"]) for target in targets]
        image = copy_to_device(torch.arange(len(targets)).repeat_interleave(torch.tensor(sizes)), logits.device)  # [T]
        labels, target_boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        cost = self.cost(logits[:, image, :, labels], boxes[:, image].transpose(0, 1), target_boxes).cpu()  # [T, L, Q]
        cost = cost.nan_to_num(nan=torch.finfo(cost.dtype).max)  # a diverged model still has an assignment
        matches = []
        for of_image in cost.split(sizes):
            pairs = [linear_sum_assignment(layer) for layer in of_image.permute(1, 2, 0).numpy()]  # of [Q, T_b] each
            query, target = torch.from_numpy(np.array(pairs)).unbind(1)
            matches.append((query, target))
        return matches

    def cost(self, logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """The cost of giving a target to a query, for the pairs of an image's T targets and queries, [T, L, Q].

        logits: [T, L, Q] of the target's class; boxes: [T, L, Q, 4]; target_boxes: [T, 4].
        """
        p = logits.sigmoid()
        negative = (1 - self.focal_alpha) * p**GAMMA * -(1 - p + 1e-8).log()
        positive = self.focal_alpha * (1 - p) ** GAMMA * -(p + 1e-8).log()
        target_boxes = target_boxes[:, None, None].expand_as(boxes)
        l1 = (boxes - target_boxes).abs().sum(-1)
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return self.cost_class * (positive - negative) + self.cost_bbox * l1 - self.cost_giou * giou


def copy_to_device(host: Tensor, device: torch.device) -> Tensor:
    """The copy of a CPU tensor on a device; the host does not wait for a GPU, which reads from pinned memory."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
