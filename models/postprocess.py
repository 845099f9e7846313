"""From the model's outputs to detections in pixels.

Shapes: B images, Q queries, K classes, N detections an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.inputs import check_target_sizes
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError


class PostProcess(nn.Module):
    """The highest scores over all queries and classes, at most `num_detections` per image (COCO scores 100)."""

    def __init__(self, num_detections: int = 100) -> None:
        super().__init__()
        self.num_detections = num_detections

    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Outputs of the model and target_sizes [B, 2], (height, width) in pixels, to B dicts.

        Each holds `scores` [N] in descending order, `labels` [N] and `boxes` [N, 4]: xyxy in pixels, not clipped.
        """
        return [
            {"scores": image[0], "labels": image[1], "boxes": image[2]}
            for image in zip(*self.batched(outputs, target_sizes), strict=True)
        ]

    @torch.no_grad()
    def batched(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all images in one: scores [B, N], labels [B, N] and boxes [B, N, 4]."""
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        check_target_sizes(target_sizes, len(logits))
        scores = logits.sigmoid().flatten(1)  # [B, Q·K]
        scores, index = scores.topk(min(self.num_detections, scores.shape[1]), dim=1)
        labels = index % logits.shape[2]
        queries = index // logits.shape[2]
        boxes = box_cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
        height, width = target_sizes.to(boxes).unbind(1)
        return scores, labels, boxes * torch.stack([width, height, width, height], dim=1)[:, None]


def check_detections(detections: dict[str, Tensor], image: str = "an image") -> None:
    """Raise InputError if scores or boxes of an image, on the CPU, are infinite or NaN."""
    if not (detections["scores"].isfinite().all() and detections["boxes"].isfinite().all()):
        raise InputError(f"the model's detections in {image} are not finite: check its weights, or train without --amp")
