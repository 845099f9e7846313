"""The training targets of images: their objects as boxes clipped to the image."""

from __future__ import annotations

import numpy as np
import torch

from datasets.records import Objects
from datasets.transforms import Target

MIN_SIDE = 0.005  # pixels, half of what COCO's coordinates are rounded to: less may vanish when float32 scales it


def make_target(image_id: int, objects: Objects, width: int, height: int, masks: np.ndarray | None = None) -> Target:
    """Return the training target of an image, with boxes as absolute xyxy clipped to the image.

    Crowds and boxes without area are left out. `masks`, if given, are those of the objects, [N, height, width].
    """
    corners, visible = visible_corners(objects.boxes, width, height)
    kept = visible & ~objects.crowds
    size = torch.tensor([height, width])
    target = {
        "boxes": torch.from_numpy(corners[kept]).float(),
        "labels": torch.from_numpy(objects.labels[kept]),
        "image_id": torch.tensor([image_id]),
        "area": torch.from_numpy(objects.areas[kept]).float(),
        "iscrowd": torch.zeros(int(kept.sum()), dtype=torch.int64),
        "orig_size": size,
        "size": size,
    }
    return target if masks is None else target | {"masks": torch.from_numpy(masks[kept])}


def visible_corners(
    boxes: np.ndarray, width: float | np.ndarray, height: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (x, y, width, height) as xyxy clipped to an image, [N, 4], and which of them are not empty, [N].

    `width` and `height` are those of the image, or of each box's image, [N].
    """
    x, y, w, h = boxes.T
    corners = np.stack([np.maximum(x, 0), np.maximum(y, 0), np.minimum(x + w, width), np.minimum(y + h, height)], 1)
    extent = corners[:, 2:] - corners[:, :2]
    return corners, (extent > MIN_SIDE).all(1)
