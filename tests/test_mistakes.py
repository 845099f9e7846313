"""Missed objects and false detections of an image."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from datasets.classes import Classes
from datasets.images import Picture
from datasets.records import Objects
from evaluation.mistakes import compare
from evaluation.pictures import colour_of


def objects(*entries: tuple[list[float], int, bool]) -> Objects:
    boxes, labels, crowds = zip(*entries, strict=True) if entries else ((), (), ())
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Objects(boxes, np.array(labels, dtype=np.int64), boxes[:, 2:].prod(1), np.array(crowds, dtype=bool))


def detections(*entries: tuple[list[float], int, float]) -> np.ndarray:
    rows = [[label, score, *box, 0, 0, 0] for box, label, score in entries]
    return np.array(rows, dtype=np.float64).reshape(-1, 9)


BOX, NEAR, FAR = [10, 10, 20, 20], [12, 10, 20, 20], [60, 60, 20, 20]


@pytest.mark.parametrize(
    ("found", "truth", "false", "missed"),
    [
        ([], [], [], []),
        ([], [(BOX, 1, False)], [], [True]),
        ([(BOX, 1, 0.9)], [], [True], []),
        ([(NEAR, 1, 0.9)], [(BOX, 1, False)], [False], [False]),
        ([(NEAR, 1, 0.9)], [(BOX, 2, False)], [True], [True]),  # another class
        ([(FAR, 1, 0.9)], [(BOX, 1, False)], [True], [True]),
        ([(BOX, 1, 0.49)], [(BOX, 1, False)], [], [True]),  # not confident
        ([(BOX, 1, 0.6), (NEAR, 1, 0.9)], [(BOX, 1, False)], [False, True], [False]),  # the second of two
        ([(NEAR, 1, 0.9), (BOX, 1, 0.8)], [(FAR, 1, False), (BOX, 1, False), (NEAR, 1, False)], None, [True, 0, 0]),
        ([(BOX, 1, 0.9), (BOX, 2, 0.8)], [([0, 0, 99, 99], 1, True)], [False, True], []),  # within a crowd
        ([], [([10, 10, 0, 20], 1, False)], [], []),  # an object without width is left out
    ],
)
def test_missed_objects_and_false_detections_are_found(found, truth, false, missed):
    comparison = compare(detections(*found), objects(*truth))
    assert comparison.false.tolist() == (false or [False] * len(comparison.found))
    assert comparison.missed.tolist() == missed
    assert comparison.mistakes == sum(false or []) + sum(missed)


def mask(left: int, top: int, right: int, bottom: int) -> dict:
    """Return the run-length code of a rectangle in an image of 40×40 pixels."""
    pixels = np.zeros((40, 40), dtype=np.uint8, order="F")
    pixels[top:bottom, left:right] = 1
    return mask_api.encode(pixels)


def test_with_masks_the_iou_is_that_of_masks():
    """A right box with a wrong mask is false; masks stay with their objects and detections if some are left out."""
    truth = objects((BOX, 1, False), ([0, 0, 0, 9], 1, False), (FAR, 2, True), (BOX, 2, False))
    found = detections((BOX, 1, 0.2), (BOX, 1, 0.6), (FAR, 2, 0.7), (FAR, 2, 0.8))
    whole, part, crowd, other = mask(10, 10, 30, 30), mask(10, 10, 19, 30), mask(0, 0, 40, 9), mask(0, 30, 40, 40)
    comparison = compare(found, truth, masks=([whole, other, crowd, other], [whole, part, crowd, other]))
    assert comparison.found[:, 1].tolist() == [0.8, 0.7, 0.6]
    assert comparison.false.tolist() == [False, False, True]
    assert comparison.missed.tolist() == [True, False]
    assert comparison.masks == ([whole, other], [other, crowd, part])


def test_masks_of_objects_and_detections_are_drawn():
    comparison = compare(
        detections((BOX, 1, 0.9)), objects((BOX, 1, False)), masks=([mask(10, 10, 30, 20)], [mask(10, 20, 30, 30)])
    )
    picture = Picture(torch.full((3, 40, 40), 100, dtype=torch.uint8), (40, 40), [])
    drawn = np.asarray(comparison.draw(picture, Classes({1: 1}, {1: "cat"}), sides=(40, 40)))[-40:]
    tint = (100 + np.array(colour_of(1))) / 2
    for panel, tinted, plain in ((drawn[:, :40], 14, 26), (drawn[:, -40:], 26, 14)):
        assert np.allclose(panel[tinted, 28], tint, atol=1)
        assert (panel[plain, 28] == 100).all()
