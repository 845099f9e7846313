"""Which objects of an image count as missed and which detections as false."""

import numpy as np
import pytest

from datasets.records import Objects
from evaluation.mistakes import compare


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
        ([], [([10, 10, 0, 20], 1, False)], [], []),  # nothing to find
    ],
)
def test_mistakes(found, truth, false, missed):
    comparison = compare(detections(*found), objects(*truth))
    assert comparison.false.tolist() == (false or [False] * len(comparison.found))
    assert comparison.missed.tolist() == missed
    assert comparison.mistakes == sum(false or []) + sum(missed)
