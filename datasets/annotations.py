"""Reading COCO annotation files: everything is checked before any long work starts.

Every error names the file and the entry. What is missing and can be filled in is (`area`, `iscrowd`, annotation ids),
also for the evaluator, which reads the same index.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from reprlib import repr as show  # cut to a readable length
from typing import Any

from pycocotools.coco import COCO

from util.classes import Classes
from util.errors import InputError, reason
from util.logger import warn

MAX_PIXELS = 10**9  # of a coordinate or side: no image is so large, and sums and areas stay finite in float32
MISSPELT_ISCROWD = frozenset({"is_crowd", "isCrowd", "IsCrowd", "is-crowd"})
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # tear a line or cannot be printed


def read_annotations(
    path: str | Path, remove_difficult: bool = False, classes: Classes | None = None, labelled: bool = True
) -> tuple[COCO, Classes]:
    """The checked and completed contents of a COCO JSON file, indexed by pycocotools, and its classes.

    In the index, labels have the place of category ids (`Classes`).

    Args:
        path: a file with lists `images`, `annotations` and `categories`.
        remove_difficult: leave out annotations marked `difficult`.
        classes: those that a model knows already, whose labels are to be used.
        labelled: False for the images of a test set, which come without the list `annotations`.

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
        raise InputError(f"{path}: not JSON ({reason(error)})") from error
    if not labelled and isinstance(data, dict):
        data["annotations"] = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise InputError(f"{path}: not a COCO instance file, it has no list {key!r}")

    images = {entry["id"]: entry for entry in map(_Checker(path, "image").image, data["images"])}
    categories = {entry["id"]: entry for entry in map(_Checker(path, "category").category, data["categories"])}
    checker = _Checker(path, "annotation")
    annotations = [checker.annotation(entry, images, categories) for entry in data["annotations"]]
    data["annotations"] = [entry for entry in annotations if not (remove_difficult and entry.get("difficult"))]
    _number_annotations(data["annotations"])
    classes = classes.of_categories(data["categories"]) if classes else Classes.from_categories(data["categories"])
    _label(data, classes)
    return index(data), classes


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
        named = isinstance(entry, dict) and (_is_int(entry.get("id")) or _is_line(entry.get("id")))
        name = f"{self.kind} id {show(entry['id'])}" if named else f"{self.kind} number {self.position}"
        raise InputError(f"{self.path}: {name}: {reason}")

    def entry(self, entry: Any, needs_id: bool = True) -> dict[str, Any]:
        self.position += 1
        if not isinstance(entry, dict):
            self.fail(entry, f"not a JSON object but {show(entry)}")
        if needs_id or entry.get("id") is not None:
            if not _is_int(entry.get("id")) or not -(2**63) <= entry["id"] < 2**63:
                self.fail(entry, f"its id must be a 64-bit integer, not {show(entry.get('id'))}")
            self.note(entry)
        return entry

    def note(self, entry: dict[str, Any]) -> None:
        if entry["id"] in self.seen:
            self.fail(entry, "the id is used twice")
        self.seen.add(entry["id"])

    def image(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        name = entry.get("file_name")
        if not isinstance(name, str) or not Path(name).name or CONTROL_CHARACTERS.search(name):
            self.fail(entry, f"'file_name' must be the image's file, not {show(name)}")
        if Path(name).anchor or ".." in Path(name).parts:
            self.fail(entry, f"{show(name)} leaves the image folder; name files relative to it, without '..'")
        for side in ("width", "height"):
            if entry.get(side) is not None and not (_is_int(entry[side]) and 0 < entry[side] <= MAX_PIXELS):
                self.fail(entry, f"'{side}' must be a positive number of pixels, not {show(entry[side])}")
        return entry

    def category(self, entry: Any) -> dict[str, Any]:
        self.position += 1
        if not isinstance(entry, dict):
            self.fail(entry, f"not a JSON object but {show(entry)}")
        if not _is_int(entry.get("id")) and not _is_line(entry.get("id")):
            self.fail(entry, f"its id must be an integer or text of one line, not {show(entry.get('id'))}")
        self.note(entry)
        name = entry["id"] if entry.get("name") is None else entry["name"]
        if not isinstance(name, int) and not _is_line(name):
            self.fail(entry, f"'name' must be text of one line, not {show(name)}")
        entry["name"] = str(name)
        return entry

    def annotation(self, entry: Any, images: dict[int, dict], categories: dict[int, dict]) -> dict[str, Any]:
        entry = self.entry(entry, needs_id=False)
        for key, known in (("image_id", images), ("category_id", categories)):
            if not isinstance(entry.get(key), str | int) or isinstance(entry[key], bool) or entry[key] not in known:
                self.fail(entry, f"its {key} {show(entry.get(key))} is not among the file's {key[:-3]} ids")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value, MAX_PIXELS) for value in box):
            self.fail(
                entry,
                f"'bbox' must be four finite numbers [x, y, width, height] of at most {MAX_PIXELS:.0e} pixels, "
                f"not {show(box)}",
            )
        if entry.get("area") is None:
            entry["area"] = max(box[2], 0) * max(box[3], 0)
        if not _is_number(entry["area"], MAX_PIXELS**2) or entry["area"] < 0:
            self.fail(
                entry, f"'area' must be a number of pixels, not {show(entry['area'])}; without it, the box's counts"
            )
        if misspelt := MISSPELT_ISCROWD & entry.keys():
            self.fail(entry, f"{show(min(misspelt))} is not a key of COCO's: write 'iscrowd'")
        if entry.get("iscrowd") not in (None, 0, 1):
            self.fail(entry, f"'iscrowd' must be 0 or 1, not {show(entry['iscrowd'])}")
        entry["iscrowd"] = int(entry.get("iscrowd") or 0)
        return entry


def _number_annotations(annotations: list[dict[str, Any]]) -> None:
    """Gives an id to annotations without one, and to one with id 0, which pycocotools takes for 'not matched'."""
    next_id = max((entry.get("id") or 0 for entry in annotations), default=0) + 1
    for entry in annotations:
        if not entry.get("id"):
            entry["id"] = next_id
            next_id += 1


def _label(data: dict[str, Any], classes: Classes) -> None:
    """Writes labels in the place of category ids."""
    label_of = {class_id: label for label, class_id in classes.ids.items()}
    for entries, key in ((data["categories"], "id"), (data["annotations"], "category_id")):
        for entry in entries:
            entry[key] = label_of[entry[key]]


def check_image_files(coco: COCO, folder: Path, source: str | Path, on_bad_image: str = "error") -> None:
    """Compares what is in the image folder with the annotation file `source`.

    Lists every folder that a `file_name` leads to, once: quicker than asking for every file, and unlike a walk through
    the tree not led in circles by symbolic links.

    Raises:
        InputError: where the folder is missing, or lacks files that the annotations name: how many, and the first.
            With `on_bad_image` "skip" that is a warning, as long as any file is there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such image folder")
    names = [Path(entry["file_name"]) for entry in coco.imgs.values()]
    present = {parent: _files_in(folder / parent) for parent in {name.parent for name in names}}
    missing = sorted(str(name) for name in names if name.name not in present[name.parent])
    if missing:
        first = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
        message = f"{folder}: {len(missing)} of the {len(names)} images of {source} are missing: {first}"
        if len(missing) == len(names):
            raise InputError(f"{message}; is it the right folder?")
        if on_bad_image == "error":
            raise InputError(f"{message}; add them, or pass --on_bad_image skip")
        warn(f"{message}; they are skipped")


def _files_in(folder: Path) -> set[str]:
    """The names of a folder's files; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except OSError:
        return set()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a symbolic link to itself
        return False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and not CONTROL_CHARACTERS.search(value)


def _is_number(value: Any, limit: int) -> bool:
    """Whether a value is a number of at most `limit` in magnitude; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit
