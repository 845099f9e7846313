"""COCO data set: pairs of image and target."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import load_annotations
from datasets.classes import Classes
from datasets.image_files import find_image_files
from datasets.images import MAX_MEGAPIXELS, Picture, image_size, read_image
from datasets.odd_boxes import odd_boxes
from datasets.records import Records
from datasets.segmentations import with_masks
from datasets.sharing import Contents, read_once
from datasets.targets import make_target, visible_corners
from datasets.transforms import Target, Transform, normalize_boxes, scale_target
from util.errors import InputError
from util.logger import warn
from util.text import counted


@dataclass
class Summary:
    """Counts of a data set: `boxes` become targets, `crowds` and `dropped` (boxes without area) do not.

    `classes` have at least one box, `empty_images` have none.
    """

    images: int
    empty_images: int
    boxes: int
    crowds: int
    dropped: int
    classes: int

    def __str__(self) -> str:
        if not self.boxes + self.crowds + self.dropped:
            return f"{counted(self.images, 'image')} without annotations"
        boxes, dropped = (counted(number, "box") for number in (self.boxes, self.dropped))
        left_out = f"; left out: {counted(self.crowds, 'crowd region')}, {dropped} without area"
        return (
            f"{counted(self.images, 'image')} ({self.empty_images:,} without boxes), {boxes} of "
            f"{counted(self.classes, 'class')}{left_out if self.crowds + self.dropped else ''}"
        )


class CocoDetection(Dataset):
    """Images with the boxes and classes of their objects, in the order of the image ids.

    Args:
        image_folder: the folder to which the `file_name`s are relative.
        annotation_file: COCO instance JSON.
        transforms: called with image, target and a random generator that depends only on (seed, epoch, index).
        seed: the seed of these generators.
        remove_difficult: leave out annotations marked `difficult`.
        on_bad_image: how to treat an image that is missing, cannot be decoded, or contradicts the annotated size:
            "error" raises InputError, "skip" uses the next image instead.
        classes: the classes of the model or the training data, whose labels are used; by default, the file's own.
        labelled: False for a test set, whose file has no annotations.
        max_megapixels: see `datasets.images.read_image`.
        share: all processes create this data set together, and the first one reads the annotations for all.
        masks: samples and ground truth also have the masks of the objects.

    The attribute `classes` holds the classes of the file. Its entries are kept as arrays only (`records`); `coco` reads
    the file again.

    Raises:
        InputError: if the annotations are not usable or image files are missing.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        transforms: Transform,
        seed: int = 0,
        remove_difficult: bool = False,
        on_bad_image: str = "error",
        classes: Classes | None = None,
        labelled: bool = True,
        max_megapixels: int = MAX_MEGAPIXELS,
        share: bool = False,
        masks: bool = False,
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_file = Path(annotation_file)
        self.load = partial(load_annotations, annotation_file, remove_difficult, classes, labelled)
        self.masks = masks
        contents = read_once(self._read) if share else self._read()
        self.records, self.classes, self.image_ids = contents.records, contents.classes, contents.image_ids
        names = [self.records.file_name(i) for i in range(len(self))]
        self.records.rename(find_image_files(names, self.image_folder, self.annotation_file, on_bad_image))
        self.transforms = transforms
        self.on_bad_image = on_bad_image
        self.max_megapixels = max_megapixels
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that running workers see changes
        if len(self) == 0:
            raise InputError(f"{annotation_file}: lists no images")
        self._skipped = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # set by workers, read by this process
        for line in (*contents.notes, *(f"{annotation_file}: {odd}" for odd in odd_boxes(self.records))):
            warn(line)

    def _read(self) -> Contents:
        loaded = self.load(segmentations=self.masks)
        segmentations = with_masks(loaded, self.annotation_file) if self.masks else None
        records = Records(loaded.images, loaded.annotations, loaded.classes.labels, segmentations)
        return Contents(records, loaded.classes, loaded.image_ids, loaded.notes)

    @cached_property
    def coco(self) -> COCO:
        """Pycocotools' index of the annotations, with labels instead of category ids; read on first use."""
        return self.load().index()

    def ground_truth(self) -> COCO:
        """Return the same index, made from `records`; it has segmentations only if this data set has masks.

        It takes ten times the memory of the arrays, so it is made again for each evaluation.
        """
        categories = [{"id": label, "name": name} for label, name in self.classes.names.items()]
        once = np.unique(self.records.ids, return_index=True)[1].tolist()  # --overfit repeats images
        records = self.records if len(once) == len(self) else self.records.select(once)
        return records.index(categories)

    def own_id(self, image_id: int) -> int | str:
        """Return the id of an image in the annotation file; samples have a number if it is a text."""
        return self.image_ids.get(image_id, image_id)

    def set_epoch(self, epoch: int) -> None:
        """Select the augmentation of the samples that are loaded from now on, also by running workers."""
        self._epoch.fill_(epoch)

    def keep_first(self, number: int, at_least: int = 0) -> None:
        """Keep only the first `number` images with targets, repeated until there are `at_least` samples."""
        _, targets = self.visible_objects()
        kept = np.unique(self.records.image_of_object[targets])[:number].tolist()
        if not kept:
            raise InputError(f"{self.annotation_file}: no image has a box to learn from")
        self.records = self.records.select(kept * max(math.ceil(at_least / len(kept)), 1))
        self._skipped = self._skipped.new_zeros(len(self)).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> list[int]:
        """Ids of the images, in the order of the samples."""
        return self.records.ids.tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Return a uint8 image [3, H, W] and its target.

        The target holds `boxes` [N, 4] (cxcywh relative to the image), `labels`, `area`, `iscrowd` [N], `image_id` [1],
        `orig_size` [2] and `size` [2], the (height, width) of the stored and of the returned image. If bad images are
        skipped, the sample is the next usable image, and `take_skipped` returns the skipped ones.

        Raises:
            InputError: if the image is bad and bad images are not skipped, or if all images are bad.
        """
        index, picture, target = self._load_from(range(len(self))[index])
        image = picture.pixels
        if picture.decoded_size != picture.size:
            target = scale_target(target, picture.size, picture.decoded_size)
        rng = random.Random(f"{self.seed} {self._epoch.item()} {index}")
        image, target = self.transforms(image, target, rng)
        return image, normalize_boxes(target, width=image.shape[2], height=image.shape[1])

    def _load_from(self, start: int) -> tuple[int, Picture, Target]:
        """Return the index of the first usable image from `start` on, the image, and its target."""
        for passed in range(len(self)):
            index = (start + passed) % len(self)
            try:
                picture = self.load_image(index)
                return index, picture, self.target_of(index, *picture.size)
            except InputError as error:
                if self.on_bad_image == "error":
                    raise InputError(f"{error}; pass --on_bad_image skip to continue without such images") from error
                self._skipped[index] = True
                last = error
        raise InputError(f"none of {counted(len(self), 'image')} can be used; the last error: {last}") from last

    def target_of(self, index: int, width: int, height: int) -> Target:
        """Return the training target of an image, with boxes as absolute xyxy clipped to the image."""
        masks = self.records.masks_of(index, width, height)
        return make_target(int(self.records.ids[index]), self.records.objects_of(index), width, height, masks)

    def load_image(self, index: int) -> Picture:
        """Read an image as stored (without its EXIF orientation: COCO's coordinates refer to the stored pixels).

        Raise InputError if it cannot be read or its size is not the annotated one.
        """
        path = self.image_folder / self.records.file_name(index)
        name = f"{path} (image id {self.own_id(int(self.records.ids[index]))})"
        picture = read_image(path, max_megapixels=self.max_megapixels, name=name)
        width, height = self.records.sizes[index].tolist()  # 0: unknown
        annotated = width or picture.size[0], height or picture.size[1]
        if picture.size != annotated:
            raise InputError(f"{name}: {self._contradiction(path, picture.size, annotated)}")
        return picture

    def _contradiction(self, path: Path, size: tuple[int, int], annotated: tuple[int, int]) -> str:
        """Return the error message for an image file that does not have its annotated (width, height)."""
        problem = f"is {size[0]}×{size[1]}, but {self.annotation_file} says {annotated[0]}×{annotated[1]}"
        if image_size(path, upright=True) == annotated:
            problem += (
                ", its size once its EXIF orientation is applied, which is not done here: "
                "store the image turned and without EXIF, or annotate it as it is stored"
            )
        return problem

    def take_skipped(self) -> list[int]:
        """Return the positions of the images that this process and its workers skipped since the last call."""
        skipped = self._skipped.nonzero().flatten().tolist()
        self._skipped.zero_()
        return skipped

    def describe_skipped(self, positions: Iterable[int]) -> str:
        """Return a line with the number and the names of the images that a run skipped."""
        skipped = {int(self.records.ids[i]): self.records.file_name(i) for i in sorted(positions)}  # each one once
        names = [f"{name} (image id {self.own_id(image_id)})" for image_id, name in skipped.items()]
        first = ", ".join(names[:10]) + (", .." if len(names) > 10 else "")
        images = counted(len(names), "image could not be read and was", "images could not be read and were")
        return f"{images} skipped: {first}"

    def check_classes(self, num_classes: int) -> None:
        """Raise InputError if a category in use is not one of a model's `num_classes`."""
        worst = int(self.records.objects.labels.max(initial=-1))
        if worst < num_classes:
            return
        class_id, name = self.classes.id_of(worst), self.classes.name_of(worst)
        advice = f"--num_classes {worst + 1} or more is needed"
        if class_id != worst:
            advice = "the model was trained without it: start from it with --finetune"
        raise InputError(
            f"{self.annotation_file}: category id {class_id} ({name}) does not fit a model of "
            f"{counted(num_classes, 'class', 'classes')}; {advice}"
        )

    def visible_objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks [N]: objects within their image (if its size is annotated), and objects that are targets."""
        sizes = np.where(self.records.sizes > 0, self.records.sizes, np.inf)[self.records.image_of_object]
        _, visible = visible_corners(self.records.objects.boxes, *sizes.T)
        return visible, visible & ~self.records.objects.crowds

    def objects_per_image(self) -> np.ndarray:
        """Return the number of objects of each image that become targets: [M]."""
        return np.bincount(self.records.image_of_object[self.visible_objects()[1]], minlength=len(self))

    def check_trains(self) -> None:
        """Raise InputError if no readable image has a box; usually, this check reads only one image.

        Boxes outside of their image do not count, even if the annotations do not give its size.
        """
        with_boxes = np.flatnonzero(self.objects_per_image()).tolist()
        if not with_boxes:
            raise InputError(f"{self.annotation_file}: no image has a box to learn from")
        for index in with_boxes:
            try:
                size = self.load_image(index).size
                if len(self.target_of(index, *size)["boxes"]):
                    return
                problem = f"the boxes of {self.records.file_name(index)} are outside of it"
            except InputError as error:
                problem = str(error)
        raise InputError(
            f"{self.annotation_file}: no image with boxes can be used ({len(with_boxes):,} tried), and nothing "
            f"would be learned; the last error: {problem}"
        )

    def summary(self) -> Summary:
        """Count all annotations, without opening an image."""
        objects = self.records.objects
        visible, kept = self.visible_objects()
        return Summary(
            images=len(self),
            empty_images=len(self) - len(np.unique(self.records.image_of_object[kept])),
            boxes=int(kept.sum()),
            crowds=int((objects.crowds & ~kept).sum()),
            dropped=int((~visible & ~objects.crowds).sum()),
            classes=len(np.unique(objects.labels[kept])),
        )
