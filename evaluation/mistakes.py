"""Mistakes of a model in an image: missed objects and false detections, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api
from torchvision.transforms.v2.functional import to_pil_image

from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.images import Picture
from datasets.records import Objects
from evaluation.pictures import annotate, side_by_side
from util.text import counted

MIN_SCORE = 0.5  # of a detection that counts
MIN_IOU = 0.5  # of a correct detection with its object
EXAMPLES, EXAMPLES_MIN_SCORE = 4, 0.3  # pictures while a model learns, when it is not yet confident
PANEL = (480, 800)  # pixels: the limits of a picture's long side, to which other images are scaled

Masks = Sequence[dict[str, Any]]  # COCO's run-length codes


@dataclass
class Comparison:
    """An image's N confident detections, the best first, and its M objects.

    Attributes:
        found: [N, 6] label, score, x, y, width, height.
        false: [N] bool, those that match no object.
        objects: the ground truth without crowds.
        missed: [M] bool, those that match no detection.
        masks: those of the M objects and of the N detections, empty without masks.
    """

    found: np.ndarray
    false: np.ndarray
    objects: Objects
    missed: np.ndarray
    masks: tuple[Masks, Masks] = ((), ())

    @property
    def mistakes(self) -> int:
        """Number of missed objects and false detections."""
        return int(self.missed.sum() + self.false.sum())

    def draw(self, picture: Picture, classes: Classes, sides: tuple[int, int] = PANEL) -> Image.Image:
        """Draw the ground truth next to the detections, with masks, names and scores, and mark what is missed or false.

        `sides` are the smallest and largest long side that both are drawn with.
        """
        scale = np.clip(max(picture.size), *sides) / max(picture.size)
        image = to_pil_image(picture.pixels).resize([max(1, round(side * scale)) for side in picture.size])
        labels = self.objects.labels.tolist(), self.found[:, 0].astype(int).tolist()
        names = [[classes.name_of(label) for label in of_panel] for of_panel in labels]
        truth = [f"{name}{' missed' * int(missed)}" for name, missed in zip(names[0], self.missed, strict=True)]
        scored = zip(names[1], self.found[:, 1], self.false, strict=True)
        found = [f"{name} {score:.2f}{' false' * int(false)}" for name, score, false in scored]
        titles = [
            f"ground truth: {counted(len(truth), 'object')}, {self.missed.sum()} missed",
            f"model: {counted(len(found), 'detection')}, {self.false.sum()} false",
        ]
        boxes = [_corners(of_panel) * scale for of_panel in (self.objects.boxes, self.found[:, 2:])]
        panels = [annotate(image, *panel) for panel in zip(boxes, labels, (truth, found), self.masks, strict=True)]
        return side_by_side(panels, titles)


def compare(
    rows: np.ndarray, objects: Objects, min_score: float = MIN_SCORE, masks: tuple[Masks, Masks] = ((), ())
) -> Comparison:
    """Match the detections of an image with its objects, as COCO does at one threshold.

    In the order of their scores, every detection of at least `min_score` is matched with the object of its class with
    the highest IoU, at least `MIN_IOU`, that no better detection has taken. A detection in a crowd region of its class
    is not false. Objects without area are left out. With masks, the IoU is that of masks, else of boxes.

    Args:
        rows: the detections, in the format of the evaluator's `Detections.rows`.
        objects: the ground truth.
        masks: those of the objects and of the detections.
    """
    order = np.argsort(-rows[:, 1], kind="stable")
    order = order[rows[order, 1] >= min_score]
    with_area = np.flatnonzero(objects.boxes[:, 2:].min(1) > 0)
    found, objects = rows[order, :6], objects.select(with_area)
    true_masks, found_masks = select_masks(masks[0], with_area), select_masks(masks[1], order)
    truth, shapes = (true_masks, found_masks) if true_masks and found_masks else (objects.boxes, found[:, 2:])
    ious = np.reshape(mask_api.iou(shapes, truth, objects.crowds), (len(found), len(objects.boxes)))
    right = (ious >= MIN_IOU) & (found[:, :1] == objects.labels)
    free = ~objects.crowds
    false = np.zeros(len(found), dtype=bool)
    for i, candidates in enumerate(right):
        if (candidates & free).any():
            free[np.where(candidates & free, ious[i], 0).argmax()] = False
        else:
            false[i] = not (candidates & objects.crowds).any()
    real = np.flatnonzero(~objects.crowds)
    return Comparison(found, false, objects.select(real), free[real], (select_masks(true_masks, real), found_masks))


def select_masks(masks: Masks, rows: Iterable[int]) -> Masks:
    """Return the masks at some indices; none if there are none."""
    return [masks[i] for i in rows] if masks else ()


def compare_image(
    evaluator: CocoEvaluator, dataset: CocoDetection, position: int, min_score: float = MIN_SCORE
) -> Comparison:
    """Return the comparison of an image that was evaluated."""
    detections, records = evaluator.detections[int(dataset.records.ids[position])], dataset.records
    masks = records.codes_of(position), detections.masks()
    return compare(detections.rows, records.objects_of(position), min_score, masks)


def evaluated(evaluator: CocoEvaluator, dataset: CocoDetection) -> list[int]:
    """Return the positions of the evaluated images, without those that could not be read."""
    return [position for position, image_id in enumerate(dataset.ids) if image_id in evaluator.detections]


def worst_images(evaluator: CocoEvaluator, dataset: CocoDetection, number: int) -> list[tuple[int, Comparison]]:
    """Return the positions and comparisons of the images with the most mistakes, at most `number`, ties by id.

    A mistake is a missed object, or a false detection with a score of at least `MIN_SCORE`; images without any are left
    out.
    """
    comparisons = [(p, compare_image(evaluator, dataset, p)) for p in evaluated(evaluator, dataset)]
    ranked = sorted(comparisons, key=lambda item: -item[1].mistakes)
    return [(position, comparison) for position, comparison in ranked[:number] if comparison.mistakes]


def draw_image(dataset: CocoDetection, classes: Classes, position: int, comparison: Comparison) -> Image.Image:
    """Return the picture of an image of a data set with its comparison."""
    return comparison.draw(dataset.load_image(position), classes)


def draw_examples(
    dataset: CocoDetection, classes: Classes, evaluator: CocoEvaluator
) -> Iterator[tuple[str, Image.Image]]:
    """Draw the first few images with objects, the same ones after every evaluation; yield them by file name."""
    with_objects = (p for p in evaluated(evaluator, dataset) if len(dataset.records.objects_of(p).labels))
    for position in islice(with_objects, EXAMPLES):
        comparison = compare_image(evaluator, dataset, position, EXAMPLES_MIN_SCORE)
        yield dataset.records.file_name(position), draw_image(dataset, classes, position, comparison)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes [N, 4] from (x, y, width, height) to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
