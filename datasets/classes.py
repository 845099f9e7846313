"""Classes: the labels that a model predicts, and the category ids and names that annotation files use for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from datasets.coco_names import COCO_NAMES, COCO_STUFF
from flags.resolve import NUM_CLASSES
from util.errors import InputError
from util.text import counted, printable

ClassId = int | str

MAX_KEPT_ID = 1_999  # the class head has a logit for every label up to the highest


def is_kept(class_id: ClassId) -> bool:
    """Return whether a category id can be used as a label unchanged."""
    return isinstance(class_id, int) and 0 <= class_id <= MAX_KEPT_ID


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or of a model.

    A label is a position in the class head. If all category ids of an annotation file are integers from 0 to
    `MAX_KEPT_ID`, as in COCO, they are the labels; otherwise, the classes are numbered.

    Attributes:
        ids: label to category id.
        names: label to name.
        isthing: for panoptic data, label to True for things (countable objects) and False for stuff; else empty.
        assumed: the names are a guess: COCO's, for a checkpoint that does not name its 91 classes.
        source: the file of the classes, for messages.
    """

    ids: dict[int, ClassId]
    names: dict[int, str]
    isthing: dict[int, bool] = field(default_factory=dict, compare=False)
    assumed: bool = field(default=False, compare=False)
    source: str = field(default="the model or the training data", compare=False)

    @classmethod
    def from_categories(cls, categories: Iterable[dict[str, Any]], source: str = "the file") -> Classes:
        """Return the classes of the list `categories` of the annotation file `source`."""
        names = {entry["id"]: printable(entry["name"]) for entry in categories}
        ids = sorted(names, key=lambda i: (isinstance(i, str), i))
        labels = ids if all(map(is_kept, ids)) else range(len(ids))
        pairs = list(zip(labels, ids, strict=True))
        return cls(dict(pairs), {label: names[class_id] for label, class_id in pairs}, source=source)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], num_classes: int) -> Classes:
        """Return the classes of a checkpoint's model; without stored names, they are COCO's or numbers."""
        of_coco = {NUM_CLASSES["coco"]: COCO_NAMES, NUM_CLASSES["coco_panoptic"]: COCO_NAMES | COCO_STUFF}
        names = checkpoint.get("class_names") or of_coco.get(num_classes) or {i: str(i) for i in range(num_classes)}
        isthing = checkpoint.get("class_isthing", {})
        if not isthing and names == COCO_NAMES | COCO_STUFF:
            isthing = {label: label in COCO_NAMES for label in names}
        names = {label: printable(name) for label, name in names.items()}
        ids = checkpoint.get("class_ids") or {label: label for label in names}
        return cls(ids, names, isthing, assumed=not checkpoint.get("class_names"))

    def state_dict(self) -> dict[str, dict]:
        """Return the tables that a checkpoint stores, as plain data."""
        tables: dict[str, dict] = {"class_ids": self.ids, "class_names": self.names}
        if self.isthing:
            tables["class_isthing"] = {label: int(isthing) for label, isthing in self.isthing.items()}
        return tables

    @property
    def num_labels(self) -> int:
        """Number of logits of a class head for these classes: the highest label + 1."""
        return max(self.ids, default=0) + 1

    @property
    def labels(self) -> dict[ClassId, int]:
        """The label of each category id."""
        return {class_id: label for label, class_id in self.ids.items()}

    def id_of(self, label: int) -> ClassId:
        """Return the category id of a label, or the label itself if it has no class."""
        return self.ids.get(label, label)

    def name_of(self, label: int) -> str:
        """Return the name of a label, or its number if it has no class."""
        return self.names.get(label, str(label))

    def __or__(self, other: Classes) -> Classes:
        """Return the union of classes with common labels; an id with different labels in both keeps that of `other`."""
        taken = set(other.ids.values())
        ids = {label: class_id for label, class_id in self.ids.items() if class_id not in taken}
        return Classes(ids | other.ids, self.names | other.names, self.isthing | other.isthing)

    def of_categories(self, categories: Iterable[dict[str, Any]], source: str = "the file") -> Classes:
        """Return the classes of another file's `categories`, with the labels that they have here.

        Classes are matched by name, since files number the same classes differently: first by exact names, then by
        names that differ only in case, blanks and underscores. If several classes share a name, or names are numbers,
        they are matched by id. A new class gets a free label: its id if labels equal ids here, else one above the
        highest.

        Raises:
            InputError: if an id stands for one class here and for another one in `source`, and the names do not tell
                which is meant.
        """
        categories = list(categories)
        by_name = self._labels_by_name(categories)
        by_id = self.labels
        plain = all(label == class_id for label, class_id in self.ids.items())
        ids: dict[int, ClassId] = {}
        names: dict[int, str] = {}
        for entry in sorted(categories, key=lambda entry: entry["id"] not in by_name):  # new classes come last
            class_id, name = entry["id"], entry["name"]
            label = by_name.get(class_id, by_id.get(class_id))
            if label is not None and class_id not in by_name and self._contradicts(label, class_id, name):
                if self.assumed:  # a model of the published code that was trained on other classes than COCO's
                    unnamed = {label: str(label) for label in self.ids}
                    return Classes(self.ids, unnamed, {}, True, self.source).of_categories(categories, source)
                raise InputError(
                    f"{source}: category id {class_id} is {name!r}, but {self.names[label]!r} in {self.source}, "
                    "and names do not tell which class is meant: give each class the same name in both files"
                )
            if label is not None and label in ids:
                raise InputError(
                    f"{source}: category ids {ids[label]} ({names[label]}) and {class_id} ({name}) are one class in "
                    f"{self.source}: {self.names[label]}; give each class the same name in both files"
                )
            if label is None and plain and is_kept(class_id) and class_id not in ids:
                label = class_id
            elif label is None:
                label = next(label for label in count(self.num_labels) if label not in ids)
            ids[label], names[label] = class_id, name
        return Classes(ids, names, source=source)

    def _labels_by_name(self, categories: list[dict[str, Any]]) -> dict[ClassId, int]:
        """Return {category id: label} for each name that exactly one of `categories` and one class here have."""
        here = {label: name for label, name in self.names.items() if not (self.assumed and name == str(label))}
        there = {entry["id"]: entry["name"] for entry in categories}
        labels: dict[ClassId, int] = {}
        for simplify in (normalized, str):  # exact names come last and so take precedence
            ours, theirs = _by_name(here, simplify), _by_name(there, simplify)
            labels |= {theirs[name]: label for name, label in ours.items() if name in theirs}
        return labels

    def _contradicts(self, label: int, class_id: ClassId, name: str) -> bool:
        """Return whether a class of this id has another name here; numbers instead of names do not count."""
        here = self.names[label]
        return here not in (str(label), name) and name != str(class_id) and normalized(here) != normalized(name)

    def difference(self, known: Classes) -> str:
        """Describe differences of ids or names from `known`, whose labels these classes have; "" if there are none."""
        renumbered = [label for label in self.ids if known.ids.get(label, self.ids[label]) != self.ids[label]]
        if renumbered:
            label = renumbered[0]
            return (
                f"{counted(len(renumbered), 'class has another id', 'classes have other ids')} "
                f"than in {known.source} ({self.names[label]} is {self.ids[label]} instead of {known.ids[label]}): "
                "matched by name"
            )
        if known.assumed and any(
            known.names.get(label, label) not in (name, str(label)) for label, name in self.names.items()
        ):
            return f"{known.source} does not name its classes, and these are not COCO's: matched by id"
        return ""


def normalized(name: str) -> str:
    """Return a name in lower case, with single blanks instead of underscores, since files differ in these."""
    return " ".join(name.replace("_", " ").casefold().split())


def _by_name(names: dict[Any, str], simplify: Callable[[str], str]) -> dict[str, Any]:
    """Return {simplified name: key} for the simplified names that occur once."""
    counts = Counter(map(simplify, names.values()))
    return {simplify(name): key for key, name in names.items() if counts[simplify(name)] == 1}
