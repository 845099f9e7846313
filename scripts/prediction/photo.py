"""An image that `scripts.predict` processes, and the pictures of its detections."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from datasets.classes import Classes
from evaluation.panoptic_pictures import draw_segments
from evaluation.pictures import annotate
from scripts.prediction.inputs import Source
from util.errors import InputError, reason

GALLERY_SIDE = 1280  # pixels: enough for a screen, a tenth of a photo's bytes
MAX_JPEG_SIDE = 65_500  # pixels; the format's limit

Detections = dict[str, Any]  # of an image, as returned by `scripts.detector.Detector`


@dataclass
class Photo:
    """An image that threads read and draw, with the model's forward pass in between.

    Attributes:
        source: the file of the image.
        image_id: the id in `detections.json`.
        pixels: uint8 [3, h, w].
        size: the (width, height) of the file, to which boxes refer; `pixels` of huge images are smaller.
        resized: `pixels` at the model's size.
        frame: (time, duration) of a video's frame, in seconds; None for an image file.
        notes: notes for the user about how the file was read.
        detections: the detections of the model; empty before the forward pass.
    """

    source: Source
    image_id: int | str
    pixels: Tensor
    size: tuple[int, int]
    resized: Tensor
    frame: tuple[Fraction, Fraction] | None = None
    notes: list[str] = field(default_factory=list)
    detections: Detections = field(default_factory=dict)

    def annotated(self, threshold: float, classes: Classes) -> Image.Image:
        """Return the image with the boxes and masks that score `threshold` or more, with names and scores.

        With a panoptic model, the image shows its segments instead.
        """
        if panoptic := self.detections.get("panoptic"):
            segments = [(entry["id"], entry["category_id"]) for entry in panoptic["segments_info"]]
            return draw_segments(to_pil_image(self.pixels), panoptic["ids"].numpy(), segments, classes)
        shown = self.detections["scores"] >= threshold
        boxes, labels, scores = (self.detections[key][shown].tolist() for key in ("boxes", "labels", "scores"))
        codes = self.detections.get("codes", [])
        masks = [code for code, is_shown in zip(codes, shown.tolist(), strict=False) if is_shown]
        image = to_pil_image(self.pixels)
        x, y = image.width / self.size[0], image.height / self.size[1]
        boxes = [(x1 * x, y1 * y, x2 * x, y2 * y) for x1, y1, x2, y2 in boxes]
        texts = [f"{classes.name_of(label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        return annotate(image, boxes, labels, texts, masks)


def weight_of(photo: Photo | InputError) -> int:
    """Return the number of pixels of a photo; 0 for an error in place of a photo."""
    return photo.pixels[0].numel() if isinstance(photo, Photo) else 0


def file_name(source: Source, suffix: str) -> str:
    """Return the file name of a source's picture: the source's name, with `suffix` added unless it ends with it."""
    return source.name if source.name.lower().endswith(suffix) else source.name + suffix


def save(image: Image.Image, path: Path, longest: int) -> None:
    """Write a JPEG file, scaled down if a side exceeds `longest`; the image may be changed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.thumbnail((longest, longest))
        image.save(path, "JPEG", quality=90)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or reason(error)})") from error
