"""Losses of masks (DETR, section 4.4), for the matched pairs of the last decoder layer.

Shapes: B images, T_b targets of image b, M matched pairs, H×W the size of the padded images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from models.criterion import Matched

ALPHA, GAMMA = 0.25, 2  # of the focal loss


class MaskLoss:
    """`loss_mask`, the focal loss averaged over pixels, and `loss_dice`; padding counts as background."""

    def __init__(self, mask_weight: float, dice_weight: float) -> None:
        self.weights = {"loss_mask": mask_weight, "loss_dice": dice_weight}

    def __call__(self, matched: Matched) -> dict[str, Tensor]:
        queries, rows = matched.last_layer_by_image()
        logits = matched.outputs["masks"].of(queries)  # [M, H / 4, W / 4]
        masks = target_masks(matched.targets, rows).to(logits.dtype)  # [M, H, W]
        logits = F.interpolate(logits[:, None], size=masks.shape[1:], mode="bilinear", align_corners=False)
        return {
            name: loss.sum() / matched.totals.num_boxes
            for name, loss in pair_losses(logits.flatten(1), masks.flatten(1)).items()
        }


def pair_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return the losses [M] of pairs of mask logits and masks, [M, pixels] each."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return {
        "loss_mask": sigmoid_focal_loss(logits, masks, alpha=ALPHA, gamma=GAMMA).mean(1),
        "loss_dice": dice,
    }


def target_masks(targets: list[dict[str, Tensor]], rows: list[Tensor]) -> Tensor:
    """Return the masks of chosen targets of all images, padded to the size of the largest image, [M, H, W].

    Args:
        targets: their `masks` are [T_b, h, w] with 0 and 1.
        rows: the indices of the chosen targets of each image.
    """
    chosen = [target["masks"][index] for target, index in zip(targets, rows, strict=True)]
    height, width = (max(masks.shape[side] for masks in chosen) for side in (1, 2))
    return torch.cat([F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1])) for masks in chosen])
