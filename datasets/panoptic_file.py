"""Reading of COCO's panoptic annotation files: every entry is checked before any long work starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.annotations import Annotations, classes_of_file
from datasets.classes import Classes
from datasets.entries import MAX_PIXELS, Checker, as_int, is_int, is_number
from datasets.json_file import check_lists, read_json
from util.errors import InputError
from util.text import counted

MOST_SEGMENTS = 2**24  # segment ids are colours of 24 bits
MISSING = "of images that the file does not list:"


def load_panoptic(path: str | Path, classes: Classes | None = None) -> Annotations:
    """Return the checked contents of a panoptic file: its segments as annotations, each with its segment id.

    The entry of each image gets the name of its PNG file as `segments_file`. Images without an annotation are left out.

    Args:
        path: a file with lists `images`, `annotations` and `categories`; it may be compressed by gzip.
        classes: the classes of the model or the training data, whose labels are used.

    Raises:
        InputError: if the file is missing, is not a COCO panoptic file, or an entry is not usable; it names the entry.
    """
    path = Path(path)
    data = read_json(path)
    check_panoptic(data, path)
    images = {entry["id"]: entry for entry in map(Checker(path, "image").image, data["images"])}
    checker = Checker(path, "category")
    categories = {entry["id"]: entry for entry in (category(checker, entry) for entry in data["categories"])}
    checker = Checker(path, "annotation")
    segments: list[dict[str, Any]] = []
    for entry in map(checker.entry, data["annotations"]):
        image_id = as_int(entry.get("image_id"))
        if not is_int(image_id) or image_id not in images:
            checker.left_out[MISSING] += 1
            continue
        image = images[image_id]
        if "segments_file" in image:
            checker.fail(entry, f"image id {image_id} already has an annotation")
        name = entry.get("file_name")
        if not isinstance(name, str) or not Path(name).name or not isinstance(entry.get("segments_info"), list):
            checker.fail(entry, "must have 'file_name', its PNG file, and a list 'segments_info'")
        image["segments_file"] = name
        segments += [segment(checker, entry, info, image, categories) for info in entry["segments_info"]]
    kept = [entry for entry in images.values() if "segments_file" in entry]
    notes = [f"{path}: {line}" for line in checker.notes()]
    if missing := len(images) - len(kept):
        notes.append(f"{path}: {counted(missing, 'image')} without an annotation left out")
    found, difference = classes_of_file(data["categories"], path, classes)
    notes += difference
    found = replace(found, isthing={label: bool(categories[i]["isthing"]) for i, label in found.labels.items()})
    return Annotations(kept, segments, data["categories"], found, {}, notes)


def check_panoptic(data: Any, path: Path) -> None:
    """Raise InputError unless a file has the lists of COCO's panoptic format."""
    check_lists(data, path, "panoptic")
    first = data["annotations"][0] if data["annotations"] else {}
    if isinstance(first, dict) and "bbox" in first and "segments_info" not in first:
        raise InputError(f"{path}: an instance file: name a panoptic one, or drop --dataset_file coco_panoptic")


def category(checker: Checker, entry: Any) -> dict[str, Any]:
    """Return a checked category; raise InputError if `isthing` is missing or wrong."""
    entry = checker.category(entry)
    if entry.get("isthing") not in (0, 1):
        checker.fail(entry, "'isthing' must be 1 for things, which are counted, and 0 for stuff")
    return entry


def segment(
    checker: Checker, entry: dict[str, Any], info: Any, image: dict[str, Any], categories: dict[Any, dict]
) -> dict[str, Any]:
    """Return an entry of `segments_info` as an annotation.

    If its box is missing, the whole image is used; the true box comes from the PNG file later.
    """
    number = as_int(info.get("id")) if isinstance(info, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < MOST_SEGMENTS:
        checker.fail(entry, f"the id of each segment must be an integer from 1 to {MOST_SEGMENTS - 1}")
    if number in (seen := image.setdefault("segment_ids", set())):
        checker.fail(entry, f"segment id {number} is used twice")
    seen.add(number)
    class_id = info.get("category_id")
    if not isinstance(class_id, int | str) or class_id not in categories:
        checker.fail(entry, f"segment id {number}: its category_id is not among the file's category ids")
    if info.get("iscrowd") not in (None, 0, 1):
        checker.fail(entry, f"segment id {number}: 'iscrowd' must be 0 or 1")
    box = info.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, MAX_PIXELS) for value in box):
        box = [0, 0, image["width"] or 1, image["height"] or 1]
    area = info.get("area")
    return {
        "id": number,
        "image_id": image["id"],
        "category_id": class_id,
        "bbox": box,
        "area": area if is_number(area, MAX_PIXELS**2) else box[2] * box[3],
        "iscrowd": int(info.get("iscrowd") or 0),
    }
