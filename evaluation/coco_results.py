"""COCO results: detections in the format of COCO's result files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets.classes import Classes
from util.files import replacing


def coco_results(
    image_id: int | str,
    detections: Iterable[tuple[int, float, Sequence[float]]],
    classes: Classes,
    with_names: bool = True,
    codes: Iterable[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield an image's detections in COCO's result format, with the category ids of the data.

    Detections of labels without a class are left out. Boxes and scores are rounded to about the precision of float32;
    rounding to hundredths of a pixel, as in COCO's files, would change AP on small images.

    Args:
        detections: (label, score, box as x, y, width, height) of each detection.
        codes: the run-length codes of their masks; empty without masks.
    """
    for (label, score, box), code in zip_longest(detections, codes):
        if label in classes.ids:
            yield {
                "image_id": image_id,
                "category_id": classes.id_of(label),
                **({"category_name": classes.name_of(label)} if with_names else {}),
                "bbox": [round(value, 4) for value in box],
                "score": round(score, 6),
                **({"segmentation": code | {"counts": code["counts"].decode()}} if code else {}),
            }


def write_coco_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list with one line per detection, without keeping the whole list in memory."""
    with replacing(path) as file:
        file.write(b"[")
        for number, result in enumerate(results):
            file.write((",\n" if number else "\n").encode() + json.dumps(result).encode())
        file.write(b"\n]\n")
