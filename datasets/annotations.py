"""Reading COCO annotation files: everything is checked before any long work starts.

Every error names the file and the entry. What can be filled in is (`area`, `iscrowd`, annotation ids), also for the
evaluator, which reads the same index.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from util.errors import InputError


def read_annotations(path: str | Path, remove_difficult: bool = False) -> COCO:
    """The checked and completed contents of a COCO JSON file, indexed by pycocotools.

    Args:
        path: a file with lists `images`, `annotations` and `categories`.
        remove_difficult: leave out annotations marked `difficult`.

    Raises:
        InputError: where the file is missing, is not COCO JSON, or an entry is not usable; names the entry.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd nesting
        raise InputError(f"{path}: not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise InputError(f"{path}: not a COCO instance file, it has no list {key!r}")

    images = {entry["id"]: entry for entry in map(_Checker(path, "image").image, data["images"])}
    categories = {entry["id"]: entry for entry in map(_Checker(path, "category").category, data["categories"])}
    annotation_checker = _Checker(path, "annotation")
    data["annotations"] = [
        annotation_checker.annotation(entry, images, categories)
        for entry in data["annotations"]
        if not (remove_difficult and isinstance(entry, dict) and entry.get("difficult"))
    ]
    _number_annotations(data["annotations"])
    return index(data)


def index(data: dict[str, Any]) -> COCO:
    """Pycocotools' index over a loaded data set, without its messages."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class _Checker:
    """Checks the entries of one list of a file, and that their ids differ."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.seen: set[int] = set()
        self.position = -1

    def fail(self, entry: Any, reason: str) -> None:
        name = entry.get("id") if isinstance(entry, dict) else None
        name = f"{self.kind} number {self.position}" if name is None else f"{self.kind} id {name}"
        raise InputError(f"{self.path}: {name}: {reason}")

    def entry(self, entry: Any, needs_id: bool = True) -> dict[str, Any]:
        self.position += 1
        if not isinstance(entry, dict):
            self.fail(entry, f"not a JSON object but {_show(entry)}")
        if needs_id or entry.get("id") is not None:
            if not _is_int(entry.get("id")):
                self.fail(entry, f"its id must be an integer, not {_show(entry.get('id'))}")
            if entry["id"] in self.seen:
                self.fail(entry, "the id is used twice")
            self.seen.add(entry["id"])
        return entry

    def image(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            self.fail(entry, f"'file_name' must be the image's file, not {_show(entry.get('file_name'))}")
        for side in ("width", "height"):
            if entry.get(side) is not None and not (_is_int(entry[side]) and entry[side] > 0):
                self.fail(entry, f"'{side}' must be a positive integer, not {_show(entry[side])}")
        return entry

    def category(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        if entry["id"] < 0:
            self.fail(entry, "ids of categories must be 0 or greater: they index the class head")
        entry["name"] = str(entry.get("name", entry["id"]))
        return entry

    def annotation(self, entry: Any, images: dict[int, dict], categories: dict[int, dict]) -> dict[str, Any]:
        entry = self.entry(entry, needs_id=False)
        for key, known in (("image_id", images), ("category_id", categories)):
            if not _is_int(entry.get(key)) or entry[key] not in known:
                self.fail(entry, f"its {key} {_show(entry.get(key))} is not among the file's {key[:-3]} ids")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite_number, box)):
            self.fail(entry, f"'bbox' must be four finite numbers [x, y, width, height], not {_show(box)}")
        if not _is_finite_number(entry.get("area")):
            entry["area"] = box[2] * box[3]
        entry["iscrowd"] = int(bool(entry.get("iscrowd", 0)))
        return entry


def _number_annotations(annotations: list[dict[str, Any]]) -> None:
    """Gives an id to annotations without one, and to one with id 0, which pycocotools takes for 'not matched'."""
    next_id = max((entry.get("id") or 0 for entry in annotations), default=0) + 1
    for entry in annotations:
        if not entry.get("id"):
            entry["id"] = next_id
            next_id += 1


def check_image_files(coco: COCO, folder: Path, source: str | Path) -> None:
    """Lists the image folder once and compares it with the annotation file `source`.

    Raises:
        InputError: where the folder is missing, or lacks files that the annotations name: how many, and the first.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such image folder")
    present = {Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names}
    missing = sorted(e["file_name"] for e in coco.imgs.values() if folder / e["file_name"] not in present)
    if missing:
        first = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
        raise InputError(f"{folder}: {len(missing)} of the {len(coco.imgs)} images of {source} are missing: {first}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    """A value of the file in an error, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
