"""Postprocessing: from the model's outputs to detections in pixels.

Shapes: B images, Q queries, K logits, N detections per image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.classification import Classification, FocalSigmoid
from models.inputs import check_target_sizes
from models.not_scriptable import NotScriptable
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError


class PostProcess(NotScriptable, nn.Module):
    """Postprocessor that keeps the detections with the highest scores, at most `num_detections` per image (COCO: 100).

    Args:
        num_detections: the maximum number per image.
        classification: defines the scores of logits.
    """

    def __init__(self, num_detections: int = 100, classification: Classification | None = None) -> None:
        super().__init__()
        self.num_detections = num_detections
        self.classification = classification or FocalSigmoid()

    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return a dict per image for the model's outputs and target_sizes [B, 2], (height, width) in pixels.

        Each has `scores` [N], `labels` [N], `boxes` [N, 4] as xyxy in pixels, not clipped, and `queries` [N], the query
        of each detection. They are in the order of `Classification.scores`.

        Raise TypeError or ValueError for target_sizes of another kind or shape.
        """
        names = "scores", "labels", "boxes", "queries"
        return [
            dict(zip(names, image, strict=True)) for image in zip(*self.batched(outputs, target_sizes), strict=True)
        ]

    @torch.no_grad()
    def batched(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the results of `forward` for all images at once: scores, labels, boxes, queries, [B, N, ..] each."""
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        check_target_sizes(target_sizes, len(logits))
        scores, labels, queries = self.classification.scores(logits, self.num_detections)
        boxes = box_cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
        height, width = target_sizes.to(boxes).unbind(1)
        return scores, labels, boxes * torch.stack([width, height, width, height], dim=1)[:, None], queries

    def extend(
        self, detections: list[dict[str, Any]], outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]
    ) -> list[dict[str, Any]]:
        """Return the detections of earlier postprocessors and of this one, in pixels of the original images."""
        found = self(outputs, torch.stack([target["orig_size"] for target in targets]))
        return [{**earlier, **own} for earlier, own in zip(detections, found, strict=True)]


def check_detections(detections: dict[str, Tensor], image: str = "an image") -> None:
    """Raise InputError if scores or boxes of an image, on the CPU, are infinite or NaN."""
    if not (detections["scores"].isfinite().all() and detections["boxes"].isfinite().all()):
        raise InputError(f"the model's detections in {image} are not finite: check its weights, or train without --amp")
