"""What loading a sample needs of a COCO file, as a few arrays.

pycocotools keeps a dictionary for every image and object. A loading worker that reads them also writes, to their
reference counts, and so copies page by page the memory that it shares with the main process: it would grow all epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO


class Objects(NamedTuple):
    """N objects of an image, or of all images.

    boxes: [N, 4] float64, x, y, width, height in pixels; float32 would lose the far corner of a box that begins far
        outside its image.
    labels: [N] int64.
    areas: [N] float64, in pixels.
    crowds: [N] bool, regions of many objects.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    @classmethod
    def from_annotations(cls, annotations: Iterable[dict[str, Any]]) -> Objects:
        """The objects that COCO's annotations describe, in the same order."""
        annotations = list(annotations)
        return cls(
            np.array([entry["bbox"] for entry in annotations], dtype=np.float64).reshape(-1, 4),
            np.array([entry["category_id"] for entry in annotations], dtype=np.int64),
            np.array([entry["area"] for entry in annotations], dtype=np.float64),
            np.array([entry["iscrowd"] for entry in annotations], dtype=bool),
        )

    def select(self, rows: slice | np.ndarray) -> Objects:
        """The objects of a slice, or where a mask [N] is True."""
        return Objects(*(column[rows] for column in self))


class Records:
    """The M images of a COCO index, in the order of their ids, or those with the given `ids`, in that order.

    Attributes:
        ids: [M] int64.
        sizes: [M, 2] int64, width and height as annotated, 0 where they are not.
        objects: those of all images, one image behind the other.
        image_of_object: [N] int64, the positions of their images.
    """

    def __init__(self, coco: COCO, ids: Sequence[int] | None = None) -> None:
        ids = sorted(coco.imgs) if ids is None else ids
        images = [coco.imgs[image_id] for image_id in ids]
        annotations = [coco.imgToAnns.get(image_id, []) for image_id in ids]
        names = [entry["file_name"].encode() for entry in images]
        counts = list(map(len, annotations))
        sizes = [[entry.get(side) or 0 for side in ("width", "height")] for entry in images]
        self.ids = np.array(ids, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.objects = Objects.from_annotations(entry for entries in annotations for entry in entries)
        self.image_of_object = np.repeat(np.arange(len(ids)), counts)
        self._first_objects = np.cumsum([0, *counts])
        self._names = b"".join(names)
        self._name_starts = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ids)

    def file_name(self, index: int) -> str:
        """The file of an image, as the annotations name it."""
        return self._names[slice(*self._name_starts[index : index + 2])].decode()

    def objects_of(self, index: int) -> Objects:
        """The objects of one image."""
        return self.objects.select(slice(*self._first_objects[index : index + 2]))
