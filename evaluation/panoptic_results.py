"""Panoptic predictions in COCO's format: a PNG file per image, and a JSON file that lists the segments of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.classes import Classes
from models.postprocess_masks import png_of_ids
from util.files import replacing


def png_and_segments(result: dict[str, Any]) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the PNG file and the segments of a result of `PostProcessPanoptic`.

    Segment ids begin with 1, since 0 stands for pixels without a segment. Category ids are labels.
    """
    found = result["segments_info"]
    segments = [{"id": entry["id"] + 1, "category_id": entry["category_id"], "area": entry["area"]} for entry in found]
    return png_of_ids(result["ids"] + bool(found)), segments


def write_panoptic_results(path: Path, entries: Sequence[dict[str, Any]], classes: Classes) -> None:
    """Write the JSON file; labels in `entries` are replaced by the category ids of the data, and names are added."""

    def named(segment: dict[str, Any]) -> dict[str, Any]:
        label = segment["category_id"]
        isthing = int(classes.isthing[label])
        return segment | {
            "category_id": classes.id_of(label),
            "category_name": classes.name_of(label),
            "isthing": isthing,
        }

    annotations = [entry | {"segments_info": list(map(named, entry["segments_info"]))} for entry in entries]
    with replacing(path) as file:
        file.write(json.dumps({"annotations": annotations}).encode())
