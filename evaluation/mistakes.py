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

MIN_SCORE = 0.5  # of detections that count
MIN_IOU = 0.5  # between a correct detection and its object
EXAMPLES, EXAMPLES_MIN_SCORE = 4, 0.3  # pictures during training, when scores are still low
PANEL = (480, 800)  # pixels: minimum and maximum long side of pictures; other images are scaled

Masks = Sequence[dict[str, Any]]  # COCO's run-length codes


@dataclass
class Comparison:
    """Comparison of an image's N confident detections, sorted by score, with its M objects.

    Attributes:
        found: [N, 6] label, score, x, y, width, height of the detections.
        false: [N] bool, True for detections that match no object.
        objects: the ground truth without crowds.
        missed: [M] bool, True for objects that match no detection.
        masks: the masks of the M objects and of the N detections, empty without masks.
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
        """Draw ground truth and detections next to each other, with masks, names, scores, "missed" and "false".

        `sides` are the minimum and maximum long side of each of the two pictures, in pixels.
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
    """Match the detections of an image with its objects, as COCO does at a single IoU threshold.

    Detections with a score of at least `min_score` are matched in descending order of their scores. Each takes the free
    object of its class with the highest IoU, if this is at least `MIN_IOU`. A detection in a crowd region of its class
    is not false. Objects without area are left out. The IoU is computed from masks if there are any, else from boxes.

    Args:
        rows: the detections, in the format of the evaluator's `Detections.rows`.
        objects: the ground truth.
        masks: the masks of the objects and of the detections.
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
    """Return the masks at some indices; an empty tuple if there are no masks."""
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
    """Return positions and comparisons of at most `number` images with the most mistakes, ties by id.

    A mistake is a missed object, or a false detection with a score of at least `MIN_SCORE`; images without any are left
    out.
    """
    comparisons = [(p, compare_image(evaluator, dataset, p)) for p in evaluated(evaluator, dataset)]
    ranked = sorted(comparisons, key=lambda item: -item[1].mistakes)
    return [(position, comparison) for position, comparison in ranked[:number] if comparison.mistakes]


def draw_image(dataset: CocoDetection, classes: Classes, position: int, comparison: Comparison) -> Image.Image:
    """Return the picture of a comparison, drawn on its image."""
    return comparison.draw(dataset.load_image(position), classes)


def draw_examples(
    dataset: CocoDetection, classes: Classes, evaluator: CocoEvaluator
) -> Iterator[tuple[str, Image.Image]]:
    """Draw the first few images with objects, the same in every evaluation; yield (file name, picture)."""
    with_objects = (p for p in evaluated(evaluator, dataset) if len(dataset.records.objects_of(p).labels))
    for position in islice(with_objects, EXAMPLES):
        comparison = compare_image(evaluator, dataset, position, EXAMPLES_MIN_SCORE)
        yield dataset.records.file_name(position), draw_image(dataset, classes, position, comparison)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes [N, 4] from (x, y, width, height) to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
