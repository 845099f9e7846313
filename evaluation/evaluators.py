"""Evaluators: each receives the detections of all images and computes metrics from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from pycocotools.coco import COCO

from datasets.coco_eval import CocoEvaluator

COCO_TYPES = ("bbox", "segm")


class Evaluator(Protocol):
    """Methods of every evaluator, in the order in which they are called.

    `stats` are its metrics for the log, by name.
    """

    def update(self, predictions: dict[int, dict[str, Any]]) -> None: ...

    def synchronize_between_processes(self) -> None: ...

    def accumulate(self) -> None: ...

    def summarize(self) -> None: ...

    @property
    def stats(self) -> dict[str, Any]: ...


def build_evaluators(kinds: Iterable[str], base_ds: COCO, max_detections: int) -> tuple[CocoEvaluator, ...]:
    """Return the evaluators for the results of these kinds of postprocessors, that of boxes first."""
    return (CocoEvaluator(base_ds, [kind for kind in kinds if kind in COCO_TYPES], max_detections),)
