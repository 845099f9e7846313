"""Boxes that seem to be in another format than COCO's [x, y, width, height] in pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from datasets.records import Records
from util.text import counted

MOST = 0.9  # share of the boxes of a file that must look odd: one program wrote them all
BEYOND = 0.1  # share of boxes that must exceed their image if they are corners
SLACK = 1.0  # pixels by which rounding may make a box exceed its image, or an area its box


def odd_boxes(records: Records) -> Iterator[str]:
    """Yield a line for each problem of the boxes: relative coordinates, corners, or areas that are too large."""
    boxes, areas = records.objects.boxes, records.objects.areas
    total = len(boxes)
    if total == 0:
        return
    all_boxes = counted(total, "box")
    x, y, w, h = boxes.T
    width, height = records.sizes[records.image_of_object].T
    known = (width > 0) & (height > 0)
    large = ~known | ((width > 4) & (height > 4))
    relative = large & (boxes >= 0).all(1) & (boxes <= 1).all(1) & (w > 0) & (h > 0)
    if relative.mean() >= MOST:
        yield (
            f"{relative.sum():,} of {all_boxes} with coordinates between 0 and 1, which look relative to the image's "
            "size, but must be in pixels"
        )
        return
    as_corners = known & (w >= x) & (h >= y) & (w <= width + SLACK) & (h <= height + SLACK)
    beyond = known & ((x + w > width + SLACK) | (y + h > height + SLACK))
    if as_corners.mean() >= MOST and beyond.mean() >= BEYOND:
        yield (
            f"{beyond.sum():,} of {all_boxes} beyond the image, as if written as corners [x1, y1, x2, y2] "
            "instead of [x, y, width, height]"
        )
        return
    exceeding = (areas > (np.abs(w * h) + SLACK) * 1.01) & ~records.objects.crowds
    if exceeding.any():
        yield (
            f"{exceeding.sum():,} of {all_boxes} with an 'area' larger than width × height: AP of small, medium and "
            "large objects depends on it"
        )


def crowded_images(counts: np.ndarray, num_queries: int, max_detections: int) -> Iterator[str]:
    """Yield a line if images have more objects than the model has queries, and one if more than `max_detections`.

    Args:
        counts: [M], the number of objects of each image.
    """
    if more := int((counts > num_queries).sum()):
        yield (
            f"{counted(more, 'image has', 'images have')} more boxes than the model's "
            f"{counted(num_queries, 'query')} can find: "
            f"pass --num_queries {counts.max()} or more"
        )
    if more := int((counts > max_detections).sum()):
        yield (
            f"{counted(more, 'image has', 'images have')} more boxes than the limit of "
            f"{counted(max_detections, 'detection')} per image: pass --max_detections {counts.max()} or more"
        )
