"""Reading COCO annotation files: everything is checked before any long work starts.

Every error names the file and the entry. What is missing and can be filled in is (`area`, `iscrowd`, ids, boxes of
segmentations), also for the evaluator, which reads the same entries. What is left out is counted in `notes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as show  # cut to a readable length
from typing import Any

from pycocotools.coco import COCO

from datasets.classes import Classes
from datasets.coco_index import index
from datasets.json_file import check_kind, read_json
from util.errors import InputError

MAX_PIXELS = 10**9  # of a coordinate or side: no image is so large, and sums and areas stay finite in float32
MISSPELT_ISCROWD = frozenset({"is_crowd", "isCrowd", "IsCrowd", "is-crowd"})
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # tear a line or cannot be printed


@dataclass
class Annotations:
    """The checked and completed entries of an annotation file, as COCO has them, with labels as category ids.

    Attributes:
        images, annotations, categories: the lists of the file.
        classes: which label has which category id and name.
        image_ids: the file's own id of each image if they are texts, by the number that stands for it; else empty.
        notes: what a user should know: entries that were left out or changed, with their number.
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    classes: Classes
    image_ids: dict[int, str | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def index(self) -> COCO:
        """Return pycocotools' index over the entries."""
        return index({"images": self.images, "annotations": self.annotations, "categories": self.categories})


def load_annotations(
    path: str | Path,
    remove_difficult: bool = False,
    classes: Classes | None = None,
    labelled: bool = True,
    segmentations: bool = True,
) -> Annotations:
    """Return the checked and completed contents of a COCO JSON file.

    Args:
        path: a file with lists `images`, `annotations` and `categories`, also compressed by gzip.
        remove_difficult: leave out annotations marked `difficult`.
        classes: those of the model or the training data, whose labels are to be used.
        labelled: False for the images of a test set, which come without the list `annotations`.
        segmentations: False drops those of annotations with a box while the file is read; they are most of it.

    Raises:
        InputError: if the file is missing, is not a COCO instance file, or an entry is not usable; names the entry.
    """
    path = Path(path)
    data = read_json(path, None if segmentations else _without_segmentation)
    if not labelled and isinstance(data, dict):
        data["annotations"] = []
    check_kind(data, path)
    image_ids = _number_images(data)
    images = {entry["id"]: entry for entry in map(_Checker(path, "image").image, data["images"])}
    categories = {entry["id"]: entry for entry in map(_Checker(path, "category").category, data["categories"])}
    checker = _Checker(path, "annotation")
    if image_ids:
        named = {original: images[number] for number, original in image_ids.items()}
        known = {_as_int(original): entry for original, entry in named.items()} | named
    else:
        known = images | {str(image_id): entry for image_id, entry in images.items()}
    annotations = list(filter(None, (checker.annotation(entry, known, categories) for entry in data["annotations"])))
    annotations = [entry for entry in annotations if not (remove_difficult and entry.get("difficult"))]
    notes = [f"{path}: {line}" for line in (*checker.notes(), *_repeated_names(data["categories"]))]
    if renumbered := _number_annotations(annotations):
        notes.append(f"{path}: {_count(renumbered, 'annotation')} with the id of another got an id of their own")
    if classes:
        known, classes = classes, classes.of_categories(data["categories"], str(path))
        if difference := classes.difference(known):
            notes.append(f"{path}: {difference}")
    else:
        classes = Classes.from_categories(data["categories"], str(path))
    _label(data["categories"], annotations, classes)
    return Annotations(data["images"], annotations, data["categories"], classes, image_ids, notes)


def read_annotations(
    path: str | Path, remove_difficult: bool = False, classes: Classes | None = None, labelled: bool = True
) -> tuple[COCO, Classes]:
    """Return pycocotools' index over a COCO JSON file, with labels as category ids, and its classes.

    Arguments and errors are those of `load_annotations`.
    """
    loaded = load_annotations(path, remove_difficult, classes, labelled)
    return loaded.index(), loaded.classes


class _Checker:
    """Checks the entries of one list of a file, and that the ids of images and categories differ."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.seen: set[int | str] = set()
        self.position = -1
        self.left_out: Counter[str] = Counter()

    def fail(self, entry: Any, reason: str) -> None:
        named = isinstance(entry, dict) and (_is_int(entry.get("id")) or _is_line(entry.get("id")))
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
        """Return what was left out, a line for each reason."""
        return [f"{_count(number, 'annotation')} {why} left out" for why, number in self.left_out.items()]

    def image(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        self.check_id(entry)
        self.note_id(entry)
        name = entry.get("file_name")
        if not isinstance(name, str) or not Path(name).name or CONTROL_CHARACTERS.search(name):
            self.fail(entry, f"'file_name' must be the image's file, not {show(name)}")
        for side in ("width", "height"):
            value = _as_int(entry.get(side)) or None  # 0: unknown
            if value is not None and not (_is_int(value) and 0 < value <= MAX_PIXELS):
                self.fail(entry, f"'{side}' must be a positive number of pixels, not {show(entry[side])}")
            entry[side] = value
        return entry

    def check_id(self, entry: dict[str, Any]) -> None:
        entry["id"] = _as_int(entry.get("id"))
        if not _is_int(entry["id"]) or not -(2**63) <= entry["id"] < 2**63:
            self.fail(entry, f"its id must be a 64-bit integer, not {show(entry['id'])}")

    def category(self, entry: Any) -> dict[str, Any]:
        entry = self.entry(entry)
        if not _is_int(entry.get("id")) and not _is_line(entry.get("id")):
            self.fail(entry, f"its id must be an integer or text of one line, not {show(entry.get('id'))}")
        self.note_id(entry)
        name = entry["id"] if entry.get("name") is None else entry["name"]
        if not isinstance(name, int) and not _is_line(name):
            self.fail(entry, f"'name' must be text of one line, not {show(name)}")
        entry["name"] = str(name)
        return entry

    def annotation(
        self, entry: Any, images: dict[int | str, dict], categories: dict[int | str, dict]
    ) -> dict[str, Any] | None:
        """Return the completed entry, with its image's number as `image_id`; None if it is left out."""
        entry = self.entry(entry)
        if entry.get("id") is not None:
            self.check_id(entry)
        for key, known in (("image_id", images), ("category_id", categories)):
            if isinstance(entry.get(key), float):
                entry[key] = _as_int(entry[key])
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
                self.left_out["without a box or polygon:"] += 1
                return None
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value, MAX_PIXELS) for value in box):
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
        if not _is_number(entry["area"], MAX_PIXELS**2) or entry["area"] < 0:
            self.fail(
                entry, f"'area' must be a number of pixels, not {show(entry['area'])}; without it, the box's counts"
            )
        if misspelt := MISSPELT_ISCROWD & entry.keys():
            self.fail(entry, f"{show(min(misspelt))} is not a key of COCO's: write 'iscrowd'")
        if entry.get("iscrowd") not in (None, 0, 1):
            self.fail(entry, f"'iscrowd' must be 0 or 1, not {show(entry['iscrowd'])}")
        entry["iscrowd"] = int(entry.get("iscrowd") or 0)


def box_of_segmentation(segmentation: Any) -> list[float] | None:
    """Return the box [x, y, width, height] around polygons, each [x1, y1, x2, y2, ..]; None if there are none."""
    polygons = segmentation if isinstance(segmentation, list) else []
    valid = [p for p in polygons if isinstance(p, list) and len(p) >= 6 and all(_is_number(v, MAX_PIXELS) for v in p)]
    if not valid or len(valid) < len(polygons):
        return None
    xs, ys = ([value for polygon in valid for value in polygon[axis::2]] for axis in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop the segmentation of an annotation with a box."""
    if entry.get("bbox"):
        entry.pop("segmentation", None)
    return entry


def _number_images(data: dict[str, Any]) -> dict[int, str | int]:
    """Number the images of a file whose ids are texts, in its order; return the ids by number, {} for integers."""
    ids = [entry.get("id") for entry in data["images"] if isinstance(entry, dict)]
    if not any(isinstance(image_id, str) for image_id in ids) or not all(_is_int(i) or _is_line(i) for i in ids):
        return {}
    if len(set(ids)) < len(ids):
        return {}  # the checker says which id is used twice
    for number, entry in enumerate(data["images"], start=1):
        entry["id"] = number
    return dict(enumerate(ids, start=1))


def _number_annotations(annotations: list[dict[str, Any]]) -> int:
    """Give an id to annotations without one, with another's, or with 0, which pycocotools takes for 'not matched'.

    Returns how many have another's.
    """
    next_id = max((entry.get("id") or 0 for entry in annotations), default=0) + 1
    seen: set[int] = set()
    repeated = 0
    for entry in annotations:
        repeated += entry.get("id") in seen
        if not entry.get("id") or entry["id"] in seen:
            entry["id"] = next_id
            next_id += 1
        seen.add(entry["id"])
    return repeated


def _label(categories: list[dict[str, Any]], annotations: list[dict[str, Any]], classes: Classes) -> None:
    """Write labels in the place of category ids."""
    label_of = {class_id: label for label, class_id in classes.ids.items()}
    for entries, key in ((categories, "id"), (annotations, "category_id")):
        for entry in entries:
            entry[key] = label_of[entry[key]]


def _repeated_names(categories: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each name that several categories have."""
    ids: dict[str, list[str]] = {}
    for entry in categories:
        ids.setdefault(entry["name"], []).append(str(entry["id"]))
    return [f"the categories {', '.join(of)} have the same name {name!r}" for name, of in ids.items() if len(of) > 1]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _as_int(value: Any) -> Any:
    """Return an integer for a whole number that is written as 160.0 or "160"; anything else as it is."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and not CONTROL_CHARACTERS.search(value)


def _is_number(value: Any, limit: int) -> bool:
    """Whether a value is a number of at most `limit` in magnitude; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit
