"""Segmentations of objects, stored as bytes in a few arrays, and drawn as masks when a sample needs them.

Polygons are stored as numbers, run-length codes as pycocotools' text: about as compact as the annotation file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_api

from datasets.annotations import Annotations
from datasets.entries import MAX_PIXELS, is_number
from datasets.run_lengths import compressed
from util.errors import InputError
from util.text import counted

FEWEST_NUMBERS = 6  # of a polygon: three points


class Segmentations(NamedTuple):
    """The segmentations of N objects.

    contents: uint8, the bytes of all segmentations, concatenated; none for an object without a usable segmentation.
    starts: [N + 1] int64, the position where each segmentation begins.
    sizes: [N, 2] int64, height and width of the mask of a run-length code; 0 for polygons.
    """

    contents: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def from_packed(cls, packed: Sequence[tuple[bytes, tuple[int, int]]]) -> Segmentations:
        """Return the segmentations in a list of results of `pack`."""
        return cls(
            np.frombuffer(b"".join(content for content, _ in packed), dtype=np.uint8),
            np.cumsum([0, *(len(content) for content, _ in packed)]),
            np.array([size for _, size in packed], dtype=np.int64).reshape(-1, 2),
        )

    def select(self, rows: np.ndarray) -> Segmentations:
        """Return the segmentations of the objects at some indices."""
        starts, ends = self.starts[:-1][rows], self.starts[1:][rows]
        parts = [self.contents[start:end] for start, end in zip(starts, ends, strict=True)]
        contents = np.concatenate(parts) if parts else self.contents[:0]
        return Segmentations(contents, np.cumsum([0, *(ends - starts)]), self.sizes[rows])

    def code_of(self, row: int, height: int, width: int) -> dict[str, Any]:
        """Return the run-length code of an object's mask, empty without a usable segmentation of this size."""
        content = self.contents[self.starts[row] : self.starts[row + 1]].tobytes()
        if content and not self.sizes[row, 0]:
            return mask_api.merge(mask_api.frPyObjects(unpack_polygons(content), height, width))
        if self.sizes[row].tolist() == [height, width]:
            return {"size": [height, width], "counts": content}
        return mask_api.encode(np.zeros((height, width), dtype=np.uint8, order="F"))

    def masks(self, rows: Sequence[int], height: int, width: int) -> np.ndarray:
        """Return the masks [len(rows), height, width] of objects of one image, as uint8 with 0 and 1."""
        masks = np.zeros((len(rows), height, width), dtype=np.uint8)
        for mask, row in zip(masks, rows, strict=True):
            mask[:] = mask_api.decode(self.code_of(row, height, width))
        return masks


def pack(segmentation: Any) -> tuple[bytes, tuple[int, int]]:
    """Return a segmentation as bytes, b"" if it is not usable, and the (height, width) of its mask if it has one."""
    if isinstance(segmentation, dict):
        code = compressed(segmentation)
        return (code["counts"], tuple(code["size"])) if code else (b"", (0, 0))
    if not isinstance(segmentation, list):
        return b"", (0, 0)
    polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation if is_polygon(polygon)]
    if not polygons:
        return b"", (0, 0)
    lengths = np.array([len(polygons), *map(len, polygons)], dtype=np.float64)
    return np.concatenate([lengths, *polygons]).tobytes(), (0, 0)


def unpack_polygons(content: bytes) -> list[list[float]]:
    """Return the polygons, each [x1, y1, x2, y2, ..], that `pack` converted to bytes."""
    numbers = np.frombuffer(content, dtype=np.float64)
    count = int(numbers[0])
    ends = np.cumsum(numbers[1 : 1 + count]).astype(np.int64)
    return [polygon.tolist() for polygon in np.split(numbers[1 + count :], ends[:-1])]


def is_polygon(polygon: Any) -> bool:
    """Return whether a value is a list of coordinates of at least three points."""
    return (
        isinstance(polygon, list)
        and len(polygon) >= FEWEST_NUMBERS
        and len(polygon) % 2 == 0
        and all(is_number(value, MAX_PIXELS) for value in polygon)
    )


def with_masks(loaded: Annotations, path: Path) -> Segmentations:
    """Remove annotations without a mask from `loaded`, with a note, and return the segmentations of the others.

    Raises:
        InputError: if an image with annotations has no size, or run-length codes are for an image of another size.
    """
    sizes = {entry["id"]: [entry.get("height"), entry.get("width")] for entry in loaded.images}
    kept, packed = [], []
    for entry in loaded.annotations:
        content, size = pack(entry.get("segmentation"))
        expected = sizes[entry["image_id"]]
        if None in expected:
            raise InputError(
                f"{path}: annotation id {entry['id']}: its image has no 'width' or no 'height', which masks need; "
                "add them, or drop --masks"
            )
        if size[0] and list(size) != expected:
            raise InputError(
                f"{path}: annotation id {entry['id']}: its segmentation is for {size[1]}×{size[0]} pixels, "
                f"but the image has {expected[1]}×{expected[0]}"
            )
        if content:
            kept.append(entry)
            packed.append((content, size))
    if missing := len(loaded.annotations) - len(kept):
        loaded.notes.append(f"{path}: {counted(missing, 'annotation')} without a usable segmentation left out")
    loaded.annotations = kept
    return Segmentations.from_packed(packed)
