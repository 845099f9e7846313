"""Evaluators: they receive the detections of all images and compute metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pycocotools.coco import COCO

from datasets.coco_eval import CocoEvaluator

COCO_TYPES = ("bbox", "segm")


class Evaluator(Protocol):
    """Methods of every evaluator, in the order of their calls.

    `stats` returns metrics by name, for the log.
    """

    def update(self, predictions: dict[int, dict[str, Any]]) -> None: ...

    def synchronize_between_processes(self) -> None: ...

    def accumulate(self) -> None: ...

    def summarize(self) -> None: ...

    @property
    def stats(self) -> dict[str, Any]: ...


def coco_evaluator(postprocessors: Mapping[str, Any], base_ds: COCO) -> CocoEvaluator:
    """Return the evaluator of the boxes, and masks if any, of `postprocessors`; `base_ds` is the ground truth."""
    kinds = [kind for kind in postprocessors if kind in COCO_TYPES]
    return CocoEvaluator(base_ds, kinds, postprocessors["bbox"].num_detections)
