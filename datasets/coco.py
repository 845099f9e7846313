"""A COCO data set as pairs of image and target."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import check_image_files, read_annotations
from datasets.transforms import Target, Transform, prepare_for_model
from util.errors import InputError, reason

MIN_SIDE = 0.005  # pixels, half of what COCO's coordinates are rounded to: less may vanish when float32 scales it
EXIF_ORIENTATION = 0x0112
EXIF_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass
class Summary:
    """What a data set holds: `boxes` become targets, `crowds` and `dropped` (boxes without area) do not.

    `classes` are those with a box; `empty_images` have none.
    """

    images: int
    empty_images: int
    boxes: int
    crowds: int
    dropped: int
    classes: int

    def __str__(self) -> str:
        left_out = f"; left out: {self.crowds} crowd regions, {self.dropped} boxes without area"
        return (
            f"{self.images} images ({self.empty_images} without boxes), {self.boxes} boxes of {self.classes} classes"
            f"{left_out if self.crowds + self.dropped else ''}"
        )


class CocoDetection(Dataset):
    """Images with the boxes and classes of their objects, in the order of the image ids.

    Args:
        image_folder: the folder that the `file_name`s start from.
        annotation_file: COCO instance JSON.
        transforms: applied to image and target, with a generator that depends on (seed, epoch, index) alone.
        seed: see `transforms`.
        remove_difficult: leave out annotations marked `difficult`.
        on_bad_image: what becomes of an image that is missing, cannot be decoded, or contradicts the annotated size:
            "error" raises InputError, "skip" takes the next one in its place.

    Raises:
        InputError: where the annotations are not usable or image files are missing.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        transforms: Transform,
        seed: int = 0,
        remove_difficult: bool = False,
        on_bad_image: str = "error",
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_file = Path(annotation_file)
        self.coco = read_annotations(annotation_file, remove_difficult)
        check_image_files(self.coco, self.image_folder, annotation_file, on_bad_image)
        self.ids = sorted(self.coco.imgs)
        self.class_names = {entry["id"]: entry["name"] for entry in self.coco.dataset["categories"]}
        self.transforms = transforms
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.epoch = 0
        if not self.ids:
            raise InputError(f"{annotation_file}: lists no images")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of the samples that are loaded from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """A uint8 image [3, H, W] and its target.

        The target holds `boxes` [N, 4] (cxcywh relative to the image), `labels`, `area`, `iscrowd` [N], `image_id` [1],
        and (height, width) as stored, `orig_size` [2], and as returned, `size` [2]. Where bad images are skipped, the
        sample is that of the next image that is not, and `skipped` [K] has the ids of those passed over.

        Raises:
            InputError: where the image is bad, or in skipping, where all are.
        """
        index, image, skipped = self._load_from(range(len(self))[index])
        image_id = self.ids[index]
        target = make_target(image_id, self.coco.imgToAnns[image_id], *image.size)
        if skipped:
            target["skipped"] = torch.tensor(skipped)
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        return prepare_for_model(*self.transforms(image, target, rng))

    def _load_from(self, start: int) -> tuple[int, Image.Image, list[int]]:
        """The first image from index `start` on that can be used: its index, itself, the ids of those skipped."""
        skipped: list[int] = []
        while True:
            index = (start + len(skipped)) % len(self)
            try:
                return index, self.load_image(self.ids[index]), skipped
            except InputError as error:
                if self.on_bad_image == "error":
                    raise InputError(f"{error}; --on_bad_image skip goes on without such images") from error
                skipped.append(self.ids[index])
                if len(skipped) == len(self):
                    raise InputError(f"none of {len(self)} images can be used; the last: {error}") from error

    def load_image(self, image_id: int) -> Image.Image:
        """The image as stored (EXIF orientation is not applied: COCO's coordinates are those of the stored pixels).

        Raises InputError where it cannot be decoded or its size is not the annotated one.
        """
        entry = self.coco.imgs[image_id]
        path = self.image_folder / entry["file_name"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about sizes and metadata that keep no image from being used
                with Image.open(path) as file:
                    problem = self._size_problem(file, entry)
                    if not problem:
                        return to_rgb(file)
        except Exception as error:  # decoders raise many types on broken files
            problem = f"cannot be decoded ({reason(error)})"
        raise InputError(f"{path} (image id {image_id}): {problem}")

    def _size_problem(self, file: Image.Image, entry: dict) -> str:
        """What is wrong with the size of an image file, if anything."""
        width, height = entry.get("width") or file.width, entry.get("height") or file.height
        if file.size == (width, height):
            return ""
        problem = f"is {file.width}×{file.height}, but {self.annotation_file} says {width}×{height}"
        if file.size != (height, width) or file.getexif().get(EXIF_ORIENTATION) not in EXIF_QUARTER_TURNS:
            return problem
        return (
            f"{problem}, its size when turned as its EXIF orientation says, which is not applied: "
            "store the image turned and without EXIF, or annotate it as it is stored"
        )

    def describe_skipped(self, ids: Iterable[int]) -> str:
        """How many images, and which, a run passed over: a line for its user."""
        names = [f"{self.coco.imgs[image_id]['file_name']} (image id {image_id})" for image_id in sorted(set(ids))]
        first = ", ".join(names[:10]) + (", .." if len(names) > 10 else "")
        return f"{len(names)} images could not be read and were skipped: {first}"

    def check_classes(self, num_classes: int) -> None:
        """Raises InputError where a category id in use has no logit in a head of `num_classes`."""
        used = {entry["category_id"] for entry in self.coco.dataset["annotations"]}
        if used and max(used) >= num_classes:
            worst = max(used)
            raise InputError(
                f"{self.annotation_file}: category id {worst} ({self.class_names[worst]}) does not fit the class head "
                f"of {num_classes} logits (ids 0 to {num_classes - 1}); --num_classes {worst + 1} or more is needed"
            )

    @property
    def num_classes(self) -> int:
        """The logits that a class head for this data needs: the highest category id + 1."""
        return max(self.class_names, default=0) + 1

    def summary(self) -> Summary:
        """Counts over all annotations, without opening an image."""
        counts = {"boxes": 0, "crowds": 0, "dropped": 0}
        filled, labels = set(), set()
        for entry in self.coco.dataset["annotations"]:
            image = self.coco.imgs[entry["image_id"]]
            visible = visible_corners(entry["bbox"], image.get("width") or math.inf, image.get("height") or math.inf)
            kind = "crowds" if entry["iscrowd"] else "boxes" if visible else "dropped"
            counts[kind] += 1
            if kind == "boxes":
                filled.add(entry["image_id"])
                labels.add(entry["category_id"])
        return Summary(images=len(self), empty_images=len(self) - len(filled), classes=len(labels), **counts)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode with 8 bits for each of red, green and blue; what is transparent keeps its colour."""
    if image.mode.startswith("I"):  # 16 bits of grey, of which PIL would clip all but the darkest 256 to white
        image = image.convert("I").point(lambda value: value / 257 + 0.5)
    return image.convert("RGB")


def make_target(image_id: int, annotations: list[dict], width: int, height: int) -> Target:
    """The training target of an image, with boxes as absolute xyxy clipped to the image.

    Crowds and boxes without area are left out.
    """
    visible = [(visible_corners(entry["bbox"], width, height), entry) for entry in annotations]
    visible = [(corners, entry) for corners, entry in visible if corners and not entry.get("iscrowd")]
    size = torch.tensor([height, width])
    return {
        "boxes": torch.tensor([corners for corners, _ in visible], dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor([entry["category_id"] for _, entry in visible], dtype=torch.int64),
        "image_id": torch.tensor([image_id]),
        "area": torch.tensor([entry["area"] for _, entry in visible], dtype=torch.float32),
        "iscrowd": torch.zeros(len(visible), dtype=torch.int64),
        "orig_size": size,
        "size": size,
    }


def visible_corners(box: list[float], width: float, height: float) -> tuple[float, float, float, float] | None:
    """A box [x, y, width, height] as corners clipped to an image; None where nothing of it is left.

    On Python's floats: float32 would lose the far corner of a box that begins far outside.
    """
    x, y, w, h = box
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return (x1, y1, x2, y2) if min(x2 - x1, y2 - y1) > MIN_SIDE else None
