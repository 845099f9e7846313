"""Entries of an annotation file as a few arrays, from which samples are made.

pycocotools keeps a dict per image and object, which takes 20 times the memory. Loading workers that read dicts would
also write to their reference counts, which copies, page by page, the memory that they share with the main process:
their memory would grow throughout the epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from datasets.classes import ClassId
from datasets.coco_index import index
from datasets.segmentations import Segmentations


class Objects(NamedTuple):
    """N objects of an image, or of all images.

    boxes: [N, 4] float64, x, y, width, height in pixels; float32 would lose the far corner of a box that begins far
        outside its image.
    labels: [N] int64.
    areas: [N] float64, in pixels.
    crowds: [N] bool, True for regions of many objects.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    @classmethod
    def from_annotations(cls, annotations: Iterable[dict[str, Any]], label_of: Mapping[ClassId, int]) -> Objects:
        """Return the objects of COCO's annotations, in the same order; `label_of` maps category ids to labels."""
        annotations = list(annotations)
        return cls(
            np.array([entry["bbox"] for entry in annotations], dtype=np.float64).reshape(-1, 4),
            np.array([label_of[entry["category_id"]] for entry in annotations], dtype=np.int64),
            np.array([entry["area"] for entry in annotations], dtype=np.float64),
            np.array([entry["iscrowd"] for entry in annotations], dtype=bool),
        )

    def select(self, rows: slice | np.ndarray) -> Objects:
        """Return the objects selected by a slice, indices, or a mask [N]."""
        return Objects(*(column[rows] for column in self))


class Names(NamedTuple):
    """N file names in one array.

    text: uint8, the bytes of all names, concatenated.
    starts: [N + 1] int64, the position where each name begins.
    """

    text: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_texts(cls, names: Iterable[str]) -> Names:
        """Return the names of a list of texts."""
        encoded = [name.encode() for name in names]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([0, *map(len, encoded)]))

    def at(self, position: int) -> str:
        """Return the name at a position."""
        return self.text[slice(*self.starts[position : position + 2])].tobytes().decode()


class Segments(NamedTuple):
    """The segments of panoptic data, whose pixels are in PNG files.

    ids: [N] int64, the value of each segment's pixels.
    files: the names of the PNG files of the M images.
    """

    ids: np.ndarray
    files: Names


class Records:
    """The M images of an annotation file in the order of their ids.

    Attributes:
        ids: [M] int64.
        sizes: [M, 2] int64, annotated width and height; 0 if they are missing.
        objects: the objects of all images, image by image.
        image_of_object: [N] int64, the position of each object's image.
        segmentations: the segmentations of the objects, or None.
        segments: the segments of panoptic data, else None.

    Args:
        images, annotations: checked entries of an annotation file; the images of panoptic data have a `segments_file`.
        label_of: category id to label.
        segmentations: the segmentations of the annotations, in the same order.
    """

    def __init__(
        self,
        images: Sequence[dict[str, Any]],
        annotations: Sequence[dict[str, Any]],
        label_of: Mapping[ClassId, int],
        segmentations: Segmentations | None = None,
    ) -> None:
        images = sorted(images, key=lambda entry: entry["id"])
        self.ids = np.array([entry["id"] for entry in images], dtype=np.int64)
        sizes = [[entry.get(side) or 0 for side in ("width", "height")] for entry in images]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        positions = np.searchsorted(self.ids, np.array([entry["image_id"] for entry in annotations], dtype=np.int64))
        order = np.argsort(positions, kind="stable")
        self.objects = Objects.from_annotations(annotations, label_of).select(order)
        self.image_of_object = positions[order]
        self.segmentations = segmentations and segmentations.select(order)
        self.segments: Segments | None = None
        if images and "segments_file" in images[0]:  # panoptic data
            ids = np.array([entry["id"] for entry in annotations], dtype=np.int64)
            self.segments = Segments(ids[order], Names.from_texts(entry["segments_file"] for entry in images))
        self.rename([entry["file_name"] for entry in images])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the contents of these records as arrays, for `from_arrays`."""
        own = {"ids": self.ids, "sizes": self.sizes, "image_of_object": self.image_of_object}
        parts: dict[str, Any] = {"objects": self.objects, "names": self._names}
        if self.segmentations:
            parts["masks"] = self.segmentations
        if self.segments:
            own["segment_ids"] = self.segments.ids
            parts["segment_files"] = self.segments.files
        return own | {f"{part}.{name}": a for part, arrays in parts.items() for name, a in arrays._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Records:
        """Return the records from which `to_arrays` made these arrays."""

        def part(kind: Any, name: str) -> Any:
            return kind(*(arrays[f"{name}.{field}"] for field in kind._fields))

        records = cls([], [], {})
        records.ids, records.sizes = arrays["ids"], arrays["sizes"]
        records.image_of_object = arrays["image_of_object"]
        records.objects = part(Objects, "objects")
        if "masks.contents" in arrays:
            records.segmentations = part(Segmentations, "masks")
        if "segment_ids" in arrays:
            records.segments = Segments(arrays["segment_ids"], part(Names, "segment_files"))
        records._set_names(part(Names, "names"))
        return records

    def rename(self, names: Sequence[str]) -> None:
        """Replace the names of the image files."""
        self._set_names(Names.from_texts(names))

    def rename_segment_files(self, names: Sequence[str]) -> None:
        """Replace the names of the PNG files of panoptic data."""
        assert self.segments is not None
        self.segments = self.segments._replace(files=Names.from_texts(names))

    def select(self, positions: Sequence[int]) -> Records:
        """Return the records of the images at some positions, in this order; positions may be repeated."""
        selected = copy.copy(self)
        rows = [np.arange(*self._first_objects[i : i + 2]) for i in positions]
        selected.ids, selected.sizes = self.ids[positions], self.sizes[positions]
        all_rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        selected.objects = self.objects.select(all_rows)
        selected.segmentations = self.segmentations and self.segmentations.select(all_rows)
        if self.segments:
            files = Names.from_texts(self.segments.files.at(i) for i in positions)
            selected.segments = Segments(self.segments.ids[all_rows], files)
        selected.image_of_object = np.repeat(np.arange(len(positions)), list(map(len, rows)))
        selected.rename([self.file_name(i) for i in positions])
        return selected

    def _set_names(self, names: Names) -> None:
        self._names = names
        self._first_objects = np.searchsorted(self.image_of_object, np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self.ids)

    def file_name(self, index: int) -> str:
        """Return the file name of an image."""
        return self._names.at(index)

    def index(self, categories: Sequence[dict[str, Any]]) -> COCO:
        """Return pycocotools' index of the boxes and masks, if there are any; `categories` are in COCO's format."""
        names = [self.file_name(i) for i in range(len(self))]
        images = [
            {"id": image_id, "file_name": name, "width": width, "height": height}
            for image_id, name, (width, height) in zip(self.ids.tolist(), names, self.sizes.tolist(), strict=True)
        ]
        columns = (self.ids[self.image_of_object], *self.objects)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        annotations = [
            {"id": n, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for n, (i, box, label, area, crowd) in enumerate(rows, start=1)
        ]
        if self.segmentations:
            codes = (code for i in range(len(self)) for code in self.codes_of(i))
            for entry, code in zip(annotations, codes, strict=True):
                entry["segmentation"] = code
        return index({"images": images, "annotations": annotations, "categories": list(categories)})

    def objects_of(self, index: int) -> Objects:
        """Return the objects of one image."""
        return self.objects.select(slice(*self._first_objects[index : index + 2]))

    def codes_of(self, index: int) -> list[dict[str, Any]]:
        """Return COCO's run-length codes of one image's masks; an empty list without segmentations."""
        if not self.segmentations:
            return []
        width, height = self.sizes[index].tolist()
        return [self.segmentations.code_of(i, height, width) for i in range(*self._first_objects[index : index + 2])]

    def segment_ids_of(self, index: int) -> np.ndarray:
        """Return the ids of the segments of one image of panoptic data."""
        assert self.segments is not None
        return self.segments.ids[slice(*self._first_objects[index : index + 2])]

    def masks_of(self, index: int, width: int, height: int) -> np.ndarray | None:
        """Return the masks [N, height, width] of the objects of one image, uint8; None without segmentations."""
        rows = range(*self._first_objects[index : index + 2])
        return self.segmentations.masks(rows, height, width) if self.segmentations else None
