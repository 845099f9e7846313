"""Panoptic data of a few coloured images, written and read by the tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.panoptic import PanopticDetection
from models.postprocess_masks import png_of_ids

NAMES = {1: "cat", 2: "dog", 7: "sky", 9: "grass"}
CATEGORIES = [{"id": i, "name": name, "isthing": int(i < 5)} for i, name in NAMES.items()]


def write_panoptic(root: Path, maps: dict[int, np.ndarray], segments: dict[int, list[tuple[int, int, int]]]) -> Path:
    """Write images of one colour and panoptic annotations: id maps [H, W], and (id, category, iscrowd) of segments."""
    for name in ("images", "panoptic"):
        (root / name).mkdir(parents=True)
    images, annotations = [], []
    for image_id, ids in maps.items():
        Image.new("RGB", ids.shape[::-1]).save(root / "images" / f"{image_id}.jpg")
        (root / "panoptic" / f"{image_id}.png").write_bytes(png_of_ids(torch.from_numpy(ids)))
        size = {"width": ids.shape[1], "height": ids.shape[0]}
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", **size})
        listed = [{"id": i, "category_id": k, "iscrowd": crowd} for i, k, crowd in segments[image_id]]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": listed})
    # Reversed, because annotations are matched with images by their ids, not by their order.
    contents = {"images": images, "annotations": annotations[::-1], "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(contents))
    return root / "panoptic.json"


def read(root: Path, **settings) -> PanopticDetection:
    return PanopticDetection(
        root / "images", root / "panoptic.json", root / "panoptic", transforms=lambda *sample: sample[:2], **settings
    )


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def write_two(root: Path) -> Path:
    """Write two images: one with a thing, a crowd and stuff, and one with a single segment."""
    first = np.zeros((20, 30), dtype=np.int64)
    first[2:10, 3:12], first[10:18, 5:25], first[18:, :] = 70_000, 300, 5
    second = np.full((16, 16), 9)
    segments = {4: [(70_000, 2, 0), (300, 1, 1), (5, 7, 0)], 11: [(9, 9, 0)]}
    write_panoptic(root, {4: first, 11: second}, segments)
    return root
