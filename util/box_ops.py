"""Boxes and points as the model knows them (normalised cxcywh, logits) and as everything else does (xyxy)."""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] boxes from (centre x, centre y, width, height) to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] boxes from corners to (centre x, centre y, width, height)."""
    return box_convert(boxes, "xyxy", "cxcywh")


def paired_generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of each box with its partner: two [..., 4] xyxy tensors to [...] (Rezatofighi et al., 2019).

    The diagonal of torchvision's `generalized_box_iou(boxes1, boxes2)` without the N×N table around it.
    """
    intersection = _area(boxes1[..., :2].maximum(boxes2[..., :2]), boxes1[..., 2:].minimum(boxes2[..., 2:]))
    union = _area(*boxes1.split(2, dim=-1)) + _area(*boxes2.split(2, dim=-1)) - intersection
    hull = _area(boxes1[..., :2].minimum(boxes2[..., :2]), boxes1[..., 2:].maximum(boxes2[..., 2:]))
    return intersection / union - (hull - union) / hull


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    """The area between corners [..., 2], 0 where they have changed places."""
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) for x in [0, 1], with numerator and denominator each kept at or above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
