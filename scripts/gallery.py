"""The gallery: one page that shows detections over their images, with a slider for the score.

The page works from disk and anywhere its folder is moved to: it loads nothing but the images and videos beside it.
They stay files of their own, since a browser loads those as they come into view; a page that holds a thousand images
within itself takes minutes to open. Boxes are drawn by the page, so that the slider acts at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from util.classes import Classes
from util.files import replacing
from util.pictures import colour_of, text_colour

LOWEST_SCORE = 0.05  # below, there is little but noise
TEMPLATE = Path(__file__).with_suffix(".html")

Entry = dict[str, Any]


def image_entry(name: str, file: Path, size: tuple[int, int], found: dict[str, Tensor]) -> Entry:
    """An image of the page.

    Args:
        name: what it is called.
        file: where it is, from the page's folder.
        size: its (width, height), that boxes are measured by.
        found: what `PostProcess` returns.
    """
    shown = found["scores"] >= LOWEST_SCORE
    width, height = size
    corners = found["boxes"][shown].reshape(-1, 2, 2).clamp(min=0).minimum(found["boxes"].new_tensor(size))
    labels, scores = found["labels"][shown].tolist(), found["scores"][shown].tolist()
    boxes = [
        [label, round(score, 3), *(round(value, 1) for value in box)]
        for label, score, box in zip(labels, scores, corners.flatten(1).tolist(), strict=True)
    ]
    return {"name": name, "file": _address(file), "width": width, "height": height, "boxes": boxes}


def video_entry(name: str, file: Path) -> Entry:
    """A video of the page, which has its boxes drawn into it."""
    return {"name": name, "file": _address(file), "video": True, "boxes": []}


def write_gallery(path: Path, entries: Sequence[Entry], classes: Classes, threshold: float) -> None:
    """Writes the page; the slider stands at `threshold` first."""
    labels = sorted({box[0] for entry in entries for box in entry["boxes"]})
    data = {
        "threshold": max(threshold, LOWEST_SCORE),
        "lowest": LOWEST_SCORE,
        "classes": {
            label: {
                "name": classes.name_of(label),
                "colour": _css(colour_of(label)),
                "text": _css(text_colour(colour_of(label))),
            }
            for label in labels
        },
        "entries": list(entries),
    }
    # Within a script element only "<" could end it; JSON has it in texts alone, where an escape means the same.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
    with replacing(path) as file:
        file.write(page.encode())


def _address(file: Path) -> str:
    """A relative path as a URL, whatever bytes its name has."""
    return quote(os.fsencode(file.as_posix()))


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
