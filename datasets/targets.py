"""Training targets of images: their objects, with boxes clipped to the image."""

from __future__ import annotations

import numpy as np
import torch

from datasets.records import Objects
from datasets.transforms import Target

MIN_SIDE = 0.005  # pixels: half a step of COCO's rounded coordinates; smaller sides may become 0 in float32


def make_target(image_id: int, objects: Objects, width: int, height: int, masks: np.ndarray | None = None) -> Target:
    """Return the training target of an image, with boxes as absolute xyxy clipped to the image.

    Crowds and boxes without area are left out. `masks` [N, height, width], if given, are the masks of the objects.
    """
    corners, visible = visible_corners(objects.boxes, width, height)
    kept = visible & ~objects.crowds
    of_kept = masks if masks is None else masks[kept]
    return as_target(image_id, corners[kept], objects.select(kept), width, height, of_kept)


def as_target(
    image_id: int, corners: np.ndarray, objects: Objects, width: int, height: int, masks: np.ndarray | None
) -> Target:
    """Return N objects as a target of tensors.

    Args:
        corners: [N, 4], their boxes as absolute xyxy, which replace those of `objects`.
        masks: [N, height, width], or None.
    """
    size = torch.tensor([height, width])
    target = {
        "boxes": torch.from_numpy(corners).float(),
        "labels": torch.from_numpy(objects.labels),
        "image_id": torch.tensor([image_id]),
        "area": torch.from_numpy(objects.areas).float(),
        "iscrowd": torch.from_numpy(objects.crowds).long(),
        "orig_size": size,
        "size": size,
    }
    return target if masks is None else target | {"masks": torch.from_numpy(masks)}


def visible_corners(
    boxes: np.ndarray, width: float | np.ndarray, height: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (x, y, width, height) as xyxy clipped to their image, [N, 4], and a mask [N] of non-empty ones.

    `width` and `height` are the size of the image, or arrays [N] with the size of each box's image.
    """
    x, y, w, h = boxes.T
    corners = np.stack([np.maximum(x, 0), np.maximum(y, 0), np.minimum(x + w, width), np.minimum(y + h, height)], 1)
    extent = corners[:, 2:] - corners[:, :2]
    return corners, (extent > MIN_SIDE).all(1)
