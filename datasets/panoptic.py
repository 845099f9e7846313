"""Panoptic data in COCO's format: each pixel of an image belongs to at most one segment, a thing or stuff.

An annotation file lists the segments of each image. In the PNG file of an image, the colour of a pixel is the id of its
segment, R + 256 G + 65536 B, or 0 for none. Annotations refer to images by image id.

Legend: N segments in an image, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import box_convert, masks_to_boxes

from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.image_files import find_image_files
from datasets.images import read_image
from datasets.panoptic_file import load_panoptic
from datasets.records import Records, Segments
from datasets.sharing import Contents
from datasets.targets import as_target, visible_corners
from datasets.transforms import Target
from util.errors import InputError
from util.text import counted


class PanopticDetection(CocoDetection):
    """Images with the boxes, classes and masks of their segments, in the order of the image ids.

    Boxes are computed from the masks (outermost pixels, as published). Crowds are targets, too. Segments without
    pixels, or with a single row or column of them, are not.

    Args:
        image_folder, annotation_file: as for `CocoDetection`, but with a panoptic annotation file.
        segments_folder: folder of the PNG files.
        settings: the other arguments of `CocoDetection`.

    Raises:
        InputError: if the annotations are not usable, or image or PNG files are missing.
    """

    def __init__(
        self, image_folder: str | Path, annotation_file: str | Path, segments_folder: str | Path, **settings: Any
    ) -> None:
        self.segments_folder = Path(segments_folder)
        self.known_classes: Classes | None = settings.get("classes")
        super().__init__(image_folder, annotation_file, **settings)
        names = [self.segments.files.at(i) for i in range(len(self))]
        found = find_image_files(names, self.segments_folder, self.annotation_file, self.on_bad_image)
        self.records.rename_segment_files(found)

    def _read(self) -> Contents:
        loaded = load_panoptic(self.annotation_file, self.known_classes)
        records = Records(loaded.images, loaded.annotations, loaded.classes.labels)
        return Contents(records, loaded.classes, loaded.image_ids, loaded.notes)

    @property
    def segments(self) -> Segments:
        """Ids of all segments, and the names of the PNG files."""
        assert self.records.segments is not None
        return self.records.segments

    @property
    def coco(self) -> COCO:
        """Raise InputError: the ground truth of boxes is in an instance file."""
        raise InputError(
            f"{self.annotation_file}: a panoptic file, on which AP of boxes is not measured; name an instance file"
        )

    def visible_objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a mask [N] of the segments within their image by their annotated boxes, twice: all become targets."""
        visible, _ = super().visible_objects()
        return visible, visible

    def target_of(self, index: int, width: int, height: int) -> Target:
        """Return the training target of an image, with boxes as absolute xyxy.

        Raises:
            InputError: if the PNG file cannot be read, has another size than the image, or an unlisted segment.
        """
        masks = self.masks_of(index, width, height)
        areas = masks.sum((1, 2), dtype=np.int64)
        boxes = np.zeros((len(masks), 4))
        boxes[areas > 0] = box_convert(masks_to_boxes(torch.from_numpy(masks[areas > 0])), "xyxy", "xywh").numpy()
        corners, kept = visible_corners(boxes, width, height)
        objects = self.records.objects_of(index)._replace(areas=areas).select(kept)
        image_id = int(self.records.ids[index])
        return as_target(image_id, corners[kept], objects, width, height, masks[kept] if self.masks else None)

    def masks_of(self, index: int, width: int, height: int) -> np.ndarray:
        """Return the masks [N, H, W] of an image's segments, uint8 with 0 and 1; see `target_of` for errors."""
        ids, name = self.id_map(index)
        if ids.shape != (height, width):
            raise InputError(f"{name}: is {ids.shape[1]}×{ids.shape[0]}, but its image is {width}×{height}")
        masks = ids == self.records.segment_ids_of(index).reshape(-1, 1, 1)
        unknown = np.unique(ids[~masks.any(0) & (ids != 0)]).tolist()
        if unknown:
            more = f" and {counted(len(unknown) - 1, 'other')}" * (len(unknown) > 1)
            raise InputError(f"{name}: contains segment {unknown[0]}{more}, which {self.annotation_file} does not list")
        return masks.view(np.uint8)

    def id_map(self, index: int) -> tuple[np.ndarray, str]:
        """Return the segment id of each pixel of an image, [H, W], and the name of the PNG file in messages."""
        path = self.segments_folder / self.segments.files.at(index)
        name = f"{path} (image id {self.own_id(int(self.records.ids[index]))})"
        return ids_of_pixels(read_image(path, max_megapixels=self.max_megapixels, name=name).pixels), name

    def segments_of(self, index: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the segment id of each pixel of an image, [H, W], and the (id, label) of each segment."""
        labels = self.records.objects_of(index).labels.tolist()
        return self.id_map(index)[0], list(zip(self.records.segment_ids_of(index).tolist(), labels, strict=True))

    def truth(self, image_ids: Collection[int], classes: Classes) -> dict[str, Any]:
        """Return a panoptic annotation file of some images and all classes, with labels as category ids."""
        annotations = []
        ids, positions = np.unique(self.records.ids, return_index=True)
        for index in positions[np.isin(ids, list(image_ids))].tolist():
            objects = self.records.objects_of(index)
            columns = (self.records.segment_ids_of(index), objects.labels, objects.crowds)
            segments = [
                {"id": segment, "category_id": label, "iscrowd": int(crowd)}
                for segment, label, crowd in zip(*(column.tolist() for column in columns), strict=True)
            ]
            name = self.segments.files.at(index)
            image_id = int(self.records.ids[index])
            annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
        categories = [
            {"id": label, "name": classes.name_of(label), "isthing": int(isthing)}
            for label, isthing in classes.isthing.items()
        ]
        return {"annotations": annotations, "categories": categories}


def ids_of_pixels(pixels: Tensor) -> np.ndarray:
    """Return the segment ids [H, W] that the pixels of a PNG file, uint8 [3, H, W], encode."""
    red, green, blue = pixels.int()
    return (red + 256 * green + 65536 * blue).numpy()
