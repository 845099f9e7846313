"""Checks of the entries of a COCO annotation file, which also fill in missing values."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from reprlib import repr as show  # cut to a readable length
from typing import Any

from pycocotools import mask

from datasets.run_lengths import compressed
from util.errors import InputError
from util.text import counted

MAX_PIXELS = 10**9  # of a coordinate or side: no image is larger, and sums and areas stay finite in float32
SMALLEST_SHARE = 0.01  # of a box: a smaller 'area' without a segmentation is probably in another unit
MISSPELT_ISCROWD = frozenset({"is_crowd", "isCrowd", "IsCrowd", "is-crowd"})
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and line breaks


class Checker:
    """Checker of the entries of one list of a file; ids of images and categories must differ."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.seen: set[int | str] = set()
        self.position = -1
        self.left_out: Counter[str] = Counter()
        self.small_areas = 0

    def fail(self, entry: Any, reason: str) -> None:
        named = isinstance(entry, dict) and (is_int(entry.get("id")) or is_line(entry.get("id")))
        name = f"{self.kind} id {show(entry['id'])}" if named else f"{self.kind} number {self.position}"
        raise InputError(f"{self.path}: {name}: {reason}")

    def entry(self, entry: Any) -> dict[str, Any]:
        self.position += 1
        if not isinstance(entry, dict):
            self.fail(entry, f"not a JSON object but {show(entry)}")
        return entry

    def note_id(self, entry: dict[str, Any]) -> None:
        if entry["id"] in self.seen:
            self.fail(entry, "the id is used twice")
        self.seen.add(entry["id"])

    def notes(self) -> list[str]:
        """Return a line for each reason why annotations were left out, and one about areas that look wrong."""
        lines = [f"{counted(number, 'annotation')} {why} left out" for why, number in self.left_out.items()]
        if self.small_areas:
            lines.append(
                f"{counted(self.small_areas, 'box has', 'boxes have')} no segmentation and an 'area' below "
                f"{SMALLEST_SHARE:.0%} of width × height: AP of small, medium and large objects depends on it; "
                "give it in pixels, or leave it out"
            )
        return lines

    def image(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        self.check_id(entry)
        self.note_id(entry)
        name = entry.get("file_name")
        if not isinstance(name, str) or not Path(name).name or CONTROL_CHARACTERS.search(name):
            self.fail(entry, f"'file_name' must be the image's file, not {show(name)}")
        for side in ("width", "height"):
            value = as_int(entry.get(side)) or None  # 0: unknown
            if value is not None and not (is_int(value) and 0 < value <= MAX_PIXELS):
                self.fail(entry, f"'{side}' must be a positive number of pixels, not {show(entry[side])}")
            entry[side] = value
        return entry

    def check_id(self, entry: dict[str, Any]) -> None:
        entry["id"] = as_int(entry.get("id"))
        if not is_int(entry["id"]) or not -(2**63) <= entry["id"] < 2**63:
            self.fail(entry, f"its id must be a 64-bit integer, not {show(entry['id'])}")

    def category(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        if not is_int(entry.get("id")) and not is_line(entry.get("id")):
            self.fail(entry, f"its id must be an integer or text of one line, not {show(entry.get('id'))}")
        self.note_id(entry)
        name = entry["id"] if entry.get("name") is None else entry["name"]
        if not isinstance(name, int) and not is_line(name):
            self.fail(entry, f"'name' must be text of one line, not {show(name)}")
        entry["name"] = str(name)
        return entry

    def annotation(
        self, entry: Any, images: dict[int | str, dict], categories: dict[int | str, dict]
    ) -> dict[str, Any] | None:
        """Return the completed entry, whose `image_id` is the number of its image; None if it is left out."""
        entry = self.entry(entry)
        if entry.get("id") is not None and not isinstance(as_int(entry["id"]), str):  # text ids are numbered later
            self.check_id(entry)
        for key, known in (("image_id", images), ("category_id", categories)):
            if isinstance(entry.get(key), float):
                entry[key] = as_int(entry[key])
            if not isinstance(entry.get(key), str | int) or isinstance(entry[key], bool):
                self.fail(entry, f"its {key} {show(entry.get(key))} is not among the file's {key[:-3]} ids")
            if entry[key] not in known and key == "category_id":
                self.fail(entry, f"its {key} {show(entry.get(key))} is not among the file's {key[:-3]} ids")
        if entry["image_id"] not in images:
            self.left_out["of images that the file does not list:"] += 1
            return None
        entry["image_id"] = images[entry["image_id"]]["id"]
        if entry.get("bbox") in (None, []):
            entry["bbox"] = box_of_segmentation(entry.get("segmentation"))
            if entry["bbox"] is None:
                self.left_out["without a box or a usable segmentation:"] += 1
                return None
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, MAX_PIXELS) for value in box):
            self.fail(
                entry,
                f"'bbox' must be four finite numbers [x, y, width, height] of at most {MAX_PIXELS:.0e} pixels, "
                f"not {show(box)}",
            )
        self.complete(entry, box)
        return entry

    def complete(self, entry: dict[str, Any], box: list[float]) -> None:
        """Check and fill in `area` and `iscrowd`."""
        if entry.get("area") is None:
            entry["area"] = max(box[2], 0) * max(box[3], 0)
        if not is_number(entry["area"], MAX_PIXELS**2) or entry["area"] < 0:
            self.fail(
                entry,
                f"'area' must be a number of pixels, not {show(entry['area'])}; "
                "if it is left out, that of the box is used",
            )
        self.small_areas += entry["area"] < SMALLEST_SHARE * box[2] * box[3] and not has_segmentation(entry)
        if misspelt := MISSPELT_ISCROWD & entry.keys():
            self.fail(entry, f"{show(min(misspelt))} is not a key of COCO's format: write 'iscrowd'")
        if entry.get("iscrowd") not in (None, 0, 1):
            self.fail(entry, f"'iscrowd' must be 0 or 1, not {show(entry['iscrowd'])}")
        entry["iscrowd"] = int(entry.get("iscrowd") or 0)


def has_segmentation(entry: dict[str, Any]) -> bool:
    """Return whether an annotation has a segmentation; exporters of boxes write [] or [[]] for none."""
    segmentation = entry.get("segmentation")
    return any(segmentation) if isinstance(segmentation, list) else bool(segmentation)


def box_of_segmentation(segmentation: Any) -> list[float] | None:
    """Return the box [x, y, width, height] around polygons or run-length codes; None if they are not usable."""
    if isinstance(segmentation, list):
        return _box_of_polygons(segmentation)
    return _box_of_runs(segmentation) if isinstance(segmentation, dict) else None


def _box_of_polygons(polygons: list[Any]) -> list[float] | None:
    """Return the box around polygons, each [x1, y1, x2, y2, ..]."""
    valid = [p for p in polygons if isinstance(p, list) and len(p) >= 6 and all(is_number(v, MAX_PIXELS) for v in p)]
    if not valid or len(valid) < len(polygons):
        return None
    xs, ys = ([value for polygon in valid for value in polygon[axis::2]] for axis in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_runs(segmentation: dict[str, Any]) -> list[float] | None:
    """Return the box around the mask of run-length codes; None if the mask is empty."""
    if not (code := compressed(segmentation)):
        return None
    x, y, w, h = mask.toBbox(code).tolist()
    return [x, y, w, h] if w > 0 and h > 0 else None


def as_int(value: Any) -> Any:
    """Convert whole numbers that are written as 160.0 or "160" to integers; return other values unchanged."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_line(value: Any) -> bool:
    return isinstance(value, str) and not CONTROL_CHARACTERS.search(value)


def is_number(value: Any, limit: int) -> bool:
    """Return whether a value is a number of at most `limit` in magnitude, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit
