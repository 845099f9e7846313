"""Detections as COCO's result files have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from util.classes import Classes
from util.files import replacing


def coco_results(image_id: int | str, found: dict[str, Tensor], classes: Classes) -> Iterator[dict[str, Any]]:
    """What is found in an image, as `PostProcess` gives it, with the data's category ids, and names beside.

    Boxes (x, y, width, height) and scores are rounded about as finely as float32 is: hundredths of a pixel, as COCO has
    them, move AP on small images. Logits that stand for no class are left out.
    """
    for score, label, (x1, y1, x2, y2) in zip(
        *(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True
    ):
        if label in classes.ids:
            yield {
                "image_id": image_id,
                "category_id": classes.id_of(label),
                "category_name": classes.name_of(label),
                "bbox": [round(value, 4) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 6),
            }


def write_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON list with a line for each detection, without holding all of them in memory."""
    with replacing(path) as file:
        separator = "[\n"
        for result in results:
            file.write((separator + json.dumps(result)).encode())
            separator = ",\n"
        file.write(b"\n]\n" if separator == ",\n" else b"[]\n")
