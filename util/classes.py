"""Which class a logit stands for: the labels that a model counts in, and the category ids and names that data uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ClassId = int | str

MAX_KEPT_ID = 1_999  # the class head has a logit for every label up to the highest

COCO_NAMES = {
    **{1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck"},
    **{9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    **{16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear"},
    **{24: "zebra", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    **{34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
    **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle"},
    **{46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple"},
    **{54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut"},
    **{61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    **{72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone", 78: "microwave"},
    **{79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book", 85: "clock", 86: "vase"},
    **{87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush"},
}
COCO_NUM_CLASSES = 91  # COCO's ids run to 90


def is_kept(class_id: ClassId) -> bool:
    """Whether a category id can be a label as it is."""
    return isinstance(class_id, int) and 0 <= class_id <= MAX_KEPT_ID


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or of a model.

    A label is a position in the class head. Ids of annotation files that are small and not negative are labels as they
    are, as COCO's; others are numbered.

    Attributes:
        ids: label to category id.
        names: label to name.
    """

    ids: dict[int, ClassId]
    names: dict[int, str]

    @classmethod
    def from_categories(cls, categories: Iterable[dict[str, Any]]) -> Classes:
        """The classes of an annotation file's `categories`."""
        names = {entry["id"]: entry["name"] for entry in categories}
        ids = sorted(names, key=lambda i: (isinstance(i, str), i))
        labels = ids if all(map(is_kept, ids)) else range(len(ids))
        pairs = list(zip(labels, ids, strict=True))
        return cls(dict(pairs), {label: names[class_id] for label, class_id in pairs})

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], num_classes: int) -> Classes:
        """The classes of a checkpoint's model, which published ones do not name: those of COCO, or just numbers."""
        unnamed = COCO_NAMES if num_classes == COCO_NUM_CLASSES else {i: str(i) for i in range(num_classes)}
        names = checkpoint.get("class_names") or unnamed
        return cls(checkpoint.get("class_ids") or {label: label for label in names}, names)

    def state_dict(self) -> dict[str, dict]:
        """What a checkpoint keeps of them, as plain data."""
        return {"class_ids": self.ids, "class_names": self.names}

    @property
    def num_labels(self) -> int:
        """The logits that a class head for them needs: the highest label + 1."""
        return max(self.ids, default=0) + 1

    def id_of(self, label: int) -> ClassId:
        """The category id of a label; of one that stands for no class, its number."""
        return self.ids.get(label, label)

    def name_of(self, label: int) -> str:
        """The name of a label; of one that stands for no class, its number."""
        return self.names.get(label, str(label))

    def __or__(self, other: Classes) -> Classes:
        """Those of both, where both are labelled alike."""
        return Classes(self.ids | other.ids, self.names | other.names)

    def named_otherwise(self, other: Classes) -> list[str]:
        """The classes that two sets name differently: one text for each, with both names."""
        return [
            f"id {self.id_of(label)} is {name} here and {other.names[label]} there"
            for label, name in self.names.items()
            if other.names.get(label, name) not in (name, str(label))  # a number says nothing
        ]

    def of_categories(self, categories: Iterable[dict[str, Any]]) -> Classes:
        """The classes of another file's `categories`, labelled as these are.

        An id that is not among these gets a label of its own: itself where labels are ids, else one beyond the highest.
        """
        label_of = {class_id: label for label, class_id in self.ids.items()}
        plain = all(label == class_id for label, class_id in self.ids.items())
        ids, names, beyond = {}, {}, self.num_labels
        for entry in categories:
            label = label_of.get(entry["id"])
            if label is None and plain and is_kept(entry["id"]):
                label = entry["id"]
            elif label is None:
                label, beyond = beyond, beyond + 1
            ids[label], names[label] = entry["id"], entry["name"]
        return Classes(ids, names)
