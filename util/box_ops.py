"""Boxes and points as the model knows them (normalised cxcywh, logits) and as everything else does (xyxy)."""

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] boxes from (centre x, centre y, width, height) to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] boxes from corners to (centre x, centre y, width, height)."""
    return box_convert(boxes, "xyxy", "cxcywh")


def paired_generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of each box with its partner: two [N, 4] xyxy tensors to [N].

    The diagonal of `generalized_box_iou(boxes1, boxes2)` without the N×N table around it.
    """
    return torch.vmap(generalized_box_iou)(boxes1[:, None], boxes2[:, None]).flatten()


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) for x in [0, 1], with numerator and denominator each kept at or above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
