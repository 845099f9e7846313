"""The gallery: one page that shows detections over their images, with a slider for the score.

The page works from disk and needs no network. It contains the images if they are small in all, so that it can be sent
as a single file; with a thousand images in it, a browser would take minutes to open it. Otherwise images, and always
videos, are files in the page's folder, which are loaded as they come into view. The page itself draws the boxes, so
that the slider acts at once.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from pycocotools import mask as mask_api

from datasets.classes import Classes
from evaluation.pictures import colour_of, text_colour
from util.files import replacing

LOWEST_SCORE = 0.05  # lower scores are mostly noise
MASK_SIDE = 160  # pixels, at most, of a mask
MOST_BYTES = 32 * 2**20  # of images within the page
TEMPLATE = Path(__file__).with_suffix(".html")

Entry = dict[str, Any]


def image_entry(name: str, file: Path, size: tuple[int, int], detections: dict[str, Any]) -> Entry:
    """Return the entry of an image.

    Args:
        name: the name of the image on the page.
        file: the path of the image relative to the page's folder.
        size: the (width, height) of the image, to which the boxes refer.
        detections: the detections from `scripts.detector.Detector`.
    """
    shown = detections["scores"] >= LOWEST_SCORE
    width, height = size
    corners = detections["boxes"][shown].reshape(-1, 2, 2).clamp(min=0).minimum(detections["boxes"].new_tensor(size))
    labels, scores = detections["labels"][shown].tolist(), detections["scores"][shown].tolist()
    boxes = [
        [label, round(score, 3), *(round(value, 1) for value in box)]
        for label, score, box in zip(labels, scores, corners.flatten(1).tolist(), strict=True)
    ]
    codes = (code for code, is_shown in zip(detections.get("codes", ()), shown.tolist(), strict=False) if is_shown)
    for box, code in zip(boxes, codes, strict=False):
        box.append(_mask(code, box[2:]))
    return {"name": name, "file": file, "width": width, "height": height, "boxes": boxes}


def video_entry(name: str, file: Path) -> Entry:
    """Return the entry of a video, which already shows its boxes."""
    return {"name": name, "file": file, "video": True, "boxes": []}


def write_gallery(path: Path, entries: Sequence[Entry], classes: Classes, threshold: float) -> None:
    """Write the page; the slider starts at `threshold`."""
    labels = sorted({box[0] for entry in entries for box in entry["boxes"]})
    images = [entry["file"] for entry in entries if "video" not in entry]
    if sum((path.parent / image).stat().st_size for image in images) <= MOST_BYTES:
        addresses = {image: _contents(path.parent / image) for image in images}
    else:
        addresses = {}
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
        "entries": [entry | {"file": addresses.get(entry["file"]) or _address(entry["file"])} for entry in entries],
    }
    # Only "<" could end a script element. JSON has it only in texts, in which it can be escaped.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
    with replacing(path) as file:
        file.write(page.encode())


def _address(file: Path) -> str:
    """Return a relative path as a URL, also for names that are not valid text."""
    return quote(os.fsencode(file.as_posix()))


def _contents(file: Path) -> str:
    """Return a URL that contains a JPEG file."""
    return f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _mask(code: dict[str, Any], box: Sequence[float]) -> str:
    """Return a URL that contains the part of a mask within a box, as a picture that is opaque on the object.

    The URL is empty if no pixel of the object is in the box.
    """
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    mask = mask_api.decode(code)[top:bottom, left:right]
    if not mask.any():
        return ""
    alpha = Image.fromarray(mask * 255)
    alpha.thumbnail((MASK_SIDE, MASK_SIDE))
    picture, file = Image.new("LA", alpha.size), io.BytesIO()
    picture.putalpha(alpha)
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
