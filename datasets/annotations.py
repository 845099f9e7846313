"""Reading of COCO annotation files: every entry is checked before any long work starts.

Errors name the file and the entry. Missing values (`area`, `iscrowd`, ids, boxes of segmentations) are filled in if
possible, also for the evaluator, which reads the same entries. `notes` count the entries that are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from datasets.classes import Classes
from datasets.coco_index import index
from datasets.entries import Checker, as_int, has_segmentation, is_int, is_line
from datasets.json_file import check_kind, read_json
from util.text import counted


@dataclass
class Annotations:
    """The checked and completed entries of an annotation file in COCO's format.

    Attributes:
        images, annotations, categories: the lists of the file.
        classes: the category id and name of each label.
        image_ids: if the file's image ids are texts, the text for each number that replaces it; else empty.
        notes: lines for the user about entries that were left out or changed, with their number.
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    classes: Classes
    image_ids: dict[int, str | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def index(self) -> COCO:
        """Return pycocotools' index of the entries, with labels as category ids, since models predict labels."""
        label_of = self.classes.labels
        annotations = [entry | {"category_id": label_of[entry["category_id"]]} for entry in self.annotations]
        categories = [entry | {"id": label_of[entry["id"]]} for entry in self.categories]
        return index({"images": self.images, "annotations": annotations, "categories": categories})


def load_annotations(
    path: str | Path,
    remove_difficult: bool = False,
    classes: Classes | None = None,
    labelled: bool = True,
    segmentations: bool = True,
) -> Annotations:
    """Return the checked and completed contents of a COCO JSON file.

    Args:
        path: a file with lists `images`, `annotations` and `categories`; it may be compressed by gzip.
        remove_difficult: leave out annotations marked `difficult`.
        classes: the classes of the model or the training data, whose labels are used.
        labelled: False for a test set, whose file has no list `annotations`.
        segmentations: False drops segmentations, the largest part of the file, while reading annotations with a box.

    Raises:
        InputError: if the file is missing, is not a COCO instance file, or an entry is not usable; it names the entry.
    """
    path = Path(path)
    data = read_json(path, None if segmentations else _without_segmentation)
    if not labelled and isinstance(data, dict):
        data["annotations"] = []
    check_kind(data, path)
    image_ids = _number_images(data)
    images = {entry["id"]: entry for entry in map(Checker(path, "image").image, data["images"])}
    categories = {entry["id"]: entry for entry in map(Checker(path, "category").category, data["categories"])}
    checker = Checker(path, "annotation")
    if image_ids:
        named = {original: images[number] for number, original in image_ids.items()}
        known = {as_int(original): entry for original, entry in named.items()} | named
    else:
        known = images | {str(image_id): entry for image_id, entry in images.items()}
    annotations = list(filter(None, (checker.annotation(entry, known, categories) for entry in data["annotations"])))
    annotations = [entry for entry in annotations if not (remove_difficult and entry.get("difficult"))]
    notes = [f"{path}: {line}" for line in (*checker.notes(), *_repeated_names(data["categories"]))]
    if renumbered := _number_annotations(annotations):
        notes.append(f"{path}: {counted(renumbered, 'annotation')} with the id of another got a new id")
    found, difference = classes_of_file(data["categories"], path, classes)
    return Annotations(data["images"], annotations, data["categories"], found, image_ids, notes + difference)


def classes_of_file(categories: list[dict[str, Any]], path: Path, known: Classes | None) -> tuple[Classes, list[str]]:
    """Return the classes of a file's categories, with the labels of `known` if given, and a note on any difference."""
    if known is None:
        return Classes.from_categories(categories, str(path)), []
    found = known.of_categories(categories, str(path))
    return found, [f"{path}: {line}" for line in [found.difference(known)] if line]


def read_annotations(
    path: str | Path, remove_difficult: bool = False, classes: Classes | None = None, labelled: bool = True
) -> tuple[COCO, Classes]:
    """Return pycocotools' index of a COCO JSON file, with labels as category ids, and its classes.

    See `load_annotations` for arguments and errors.
    """
    loaded = load_annotations(path, remove_difficult, classes, labelled)
    return loaded.index(), loaded.classes


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace the segmentation of an annotation with a box by a bool: there is one or not."""
    if entry.get("bbox") and "segmentation" in entry:
        entry["segmentation"] = has_segmentation(entry)
    return entry


def _number_images(data: dict[str, Any]) -> dict[int, str | int]:
    """Replace image ids that are texts by numbers, in order; return {number: text}, or {} if ids are integers."""
    ids: list[Any] = [entry.get("id") for entry in data["images"] if isinstance(entry, dict)]
    if not any(isinstance(image_id, str) for image_id in ids) or not all(is_int(i) or is_line(i) for i in ids):
        return {}
    if len(set(ids)) < len(ids):
        return {}  # the checker's error names the id that is used twice
    for number, entry in enumerate(data["images"], start=1):
        entry["id"] = number
    return dict(enumerate(ids, start=1))


def _number_annotations(annotations: list[dict[str, Any]]) -> int:
    """Give new ids to annotations whose id is missing, a text, repeated, or 0 ("not matched" in pycocotools).

    Return the number of repeated ids.
    """
    for entry in annotations:
        if isinstance(entry.get("id"), str):
            entry["id"] = None
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


def _repeated_names(categories: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each name that several categories share."""
    ids: dict[str, list[str]] = {}
    for entry in categories:
        ids.setdefault(entry["name"], []).append(str(entry["id"]))
    return [f"the categories {', '.join(of)} have the same name {name!r}" for name, of in ids.items() if len(of) > 1]
