"""A small data set whose annotations the tests change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from datasets.coco import CocoDetection
from datasets.transforms import make_coco_transforms

SIZE = (160, 120)
NAMES = {1: "WBC", 2: "RBC", 3: "Platelets"}


def cells(split: str = "train", images: int = 4) -> dict:
    """Return annotations of images with three boxes each."""
    return {
        "images": [
            {"id": i, "file_name": f"{split}{i:02}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for i in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": 3 * i + k,
                "image_id": i,
                "category_id": k,
                "bbox": [50.0 * (k - 1) + 5, 60.5, 40.0, 50.0],
                "area": 2000.0,
                "iscrowd": 0,
            }
            for i in range(1, images + 1)
            for k in NAMES
        ],
        "categories": [{"id": class_id, "name": name} for class_id, name in NAMES.items()],
    }


def load_cells(
    root: Path, data: dict | bytes, split: str = "train", rename: Callable[[str], str] = str, **options: Any
) -> CocoDetection:
    """Write annotations and the images of `cells` into a folder, and return the data set."""
    folder = root / split
    for entry in cells(split)["images"]:
        path = folder / rename(entry["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(path, "JPEG")
    path = root / f"{split}.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return CocoDetection(folder, path, make_coco_transforms("val", 64, 107), **options)
