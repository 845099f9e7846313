"""Conversions of boxes and points between the model's formats (normalised cxcywh, logits) and xyxy; overlaps of boxes.

Forks also import torchvision's `generalized_box_iou` and `masks_to_boxes` from here.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, masks_to_boxes

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "inverse_sigmoid",
    "masks_to_boxes",
    "paired_generalized_box_iou",
]


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from (centre x, centre y, width, height) to corners."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from corners to (centre x, centre y, width, height)."""
    return box_convert(boxes, "xyxy", "cxcywh")


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the union's area, [N, M] both, of boxes [N, 4] and [M, 4], all xyxy."""
    intersection, union = _overlap(boxes1[:, None], boxes2)
    return intersection / union, union


def paired_generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalised IoU [...] of each box with its partner in two xyxy tensors [..., 4].

    Rezatofighi et al., 2019. This is the diagonal of torchvision's `generalized_box_iou(boxes1, boxes2)`, without the
    rest of its N×N table.
    """
    intersection, union = _overlap(boxes1, boxes2)
    hull = _area(boxes1[..., :2].minimum(boxes2[..., :2]), boxes1[..., 2:].maximum(boxes2[..., 2:]))
    return intersection / union - (hull - union) / hull


def _overlap(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas of the intersection and of the union of xyxy boxes [..., 4], whose shapes broadcast."""
    intersection = _area(boxes1[..., :2].maximum(boxes2[..., :2]), boxes1[..., 2:].minimum(boxes2[..., 2:]))
    union = _area(*boxes1.split(2, dim=-1)) + _area(*boxes2.split(2, dim=-1)) - intersection
    return intersection, union


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    """Return the area between corners [..., 2], 0 if they are the wrong way round."""
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(x / (1 - x)) for x in [0, 1], with numerator and denominator both at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
