"""The assignment of targets to queries (DETR, section 3.1).

Shapes: L decoder layers, B images, Q queries in G groups, K logits, T_b targets of image b, T targets of all images,
M = sum of G·min(Q / G, T_b) matched pairs per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.classification import Classification, SoftmaxWithNoObject
from util.box_ops import box_cxcywh_to_xyxy, paired_generalized_box_iou
from util.errors import InputError


class Matches(NamedTuple):
    """Matched pairs of a batch, as indices [L, M].

    layer, image, query: the index of the prediction in [L, B, Q, ..].
    target: the index of the target among the concatenated targets of all images.
    per_image: the number of pairs of each image, which is the same in every layer.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    per_image: list[int]


class HungarianMatcher:
    """Hungarian matcher: finds the pairs of queries and targets with the least total cost, per decoder layer and image.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the cost of the class, of the L1 distance between normalised cxcywh
            boxes, and of the negative generalised IoU.
        classification: defines the cost of the class, by default as in DETR.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        classification: Classification | None = None,
    ) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise InputError("--set_cost_class, --set_cost_bbox and --set_cost_giou cannot all be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.classification = classification or SoftmaxWithNoObject()

    def __call__(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], num_groups: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the matched queries and targets of each image, [G·min(Q / G, T_b)] each, as the published code does.

        Args:
            outputs: `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4].
            targets: `labels` and `boxes` of B images.
            num_groups: G.
        """
        matches = self.match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets, num_groups)
        pairs, first = [], 0
        for image, target in enumerate(targets):
            mine = matches.image[0] == image
            pairs.append((matches.query[0][mine].cpu(), matches.target[0][mine].cpu() - first))
            first += len(target["labels"])
        return pairs

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], num_groups: int = 1) -> Matches:
        """Return the matches of logits [L, B, Q, K] and boxes [L, B, Q, 4] with the `labels` and `boxes` of B targets.

        Each group of queries is matched with all targets (Group DETR). The queries of an image are in ascending order.
        The host waits for the device once, for the costs of all layers and images; the costs of an image are computed
        only for its own targets.
        """
        sizes = [len(target["labels"]) for target in targets]
        cost = self.cost(logits, boxes, targets, sizes).cpu()  # [T, L, Q]
        cost = cost.nan_to_num(nan=torch.finfo(cost.dtype).max)  # a diverged model still has an assignment
        first_query = torch.arange(num_groups)[:, None] * (logits.shape[2] // num_groups)  # [G, 1]
        image, query, target = [], [], []
        first = 0  # first row of the image's targets among all targets
        for i, cost_of_image in enumerate(cost.split(sizes)):
            groups = cost_of_image.permute(1, 2, 0).unflatten(1, (num_groups, -1))  # [L, G, Q / G, T_b]
            pairs = [linear_sum_assignment(group) for group in groups.flatten(0, 1).numpy()]
            pairs = torch.from_numpy(np.array(pairs)).unflatten(0, (-1, num_groups))  # [L, G, 2, min(Q / G, T_b)]
            queries = (pairs[:, :, 0] + first_query).flatten(1)
            image.append(torch.full_like(queries, i))
            query.append(queries)
            target.append(pairs[:, :, 1].flatten(1) + first)
            first += sizes[i]
        index = torch.stack([torch.cat(parts, dim=1) for parts in (image, query, target)])  # [3, L, M]
        index = copy_to_device(index, logits.device)
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(index[0])
        return Matches(layer, index[0], index[1], index[2], per_image=[queries.shape[1] for queries in query])

    def cost(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], sizes: list[int]) -> Tensor:
        """Return the cost of assigning each target to each query of its image, [T, L, Q]; `sizes` are the T_b."""
        labels, target_boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        image = torch.arange(len(targets)).repeat_interleave(torch.tensor(sizes))  # [T], that of each target
        image = copy_to_device(image, logits.device)
        boxes = boxes.transpose(0, 1)[image]  # [T, L, Q, 4]
        target_boxes = target_boxes[:, None, None].expand_as(boxes)
        l1 = (boxes - target_boxes).abs().sum(-1)
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        cost_class = self.classification.cost(logits, image, labels)
        return self.cost_class * cost_class + self.cost_bbox * l1 - self.cost_giou * giou


def copy_to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on a device; the host does not wait for a GPU, which reads pinned memory."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
