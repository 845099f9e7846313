"""Report of `main.py --eval`: the detections, precision-recall curves, and the worst images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval

from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.coco_eval import AT_100, CocoEvaluator, evaluation_as_plain_data
from evaluation.coco_results import coco_results, write_coco_results
from evaluation.mistakes import draw_image, worst_images
from util.distributed import is_main_process
from util.files import replacing, save_on_master
from util.logger import log
from util.text import counted

Bar = tuple[str, float | None]  # name and score of a class; None: no bar

WORST = 16  # images
MOST_BARS = 30  # one per class; with more classes, only the best and worst are shown
LONGEST_NAME = 24  # characters next to a bar
SUFFIXES = {"bbox": "", "segm": "_masks"}  # of the files about boxes and masks
TEST_RESULTS = "detections_test-dev2017_conddetr_results.json"  # COCO's detections_[testset]_[alg]_results.json


def write_report(evaluator: CocoEvaluator, dataset: CocoDetection, classes: Classes, folder: Path) -> None:
    """Write the results of an evaluation, on the main process only.

    - `detections.json`: all detections in COCO's result format, with `category_name`;
    - `precision_recall.png`: precision over recall, and AP per class;
    - `worst/`: the images with the most mistakes (`evaluation.mistakes`), the worst one as `01_ID.jpg`;
    - `eval.pth`: the evaluator's arrays;
    - `precision_recall_masks.png` and `eval_masks.pth`: the same for masks, if there are any.
    """
    for kind in evaluator.iou_types:
        save_on_master(evaluation_as_plain_data(evaluator.coco_eval[kind]), folder / f"eval{SUFFIXES[kind]}.pth")
    if not is_main_process():
        return
    all_results = results_of(evaluator, classes, with_names=True, own_id=dataset.own_id)
    write_coco_results(folder / "detections.json", all_results)
    curves = [f"precision_recall{SUFFIXES[kind]}.png" for kind in evaluator.iou_types]
    for kind, name in zip(evaluator.iou_types, curves, strict=True):
        with replacing(folder / name) as file:
            precision_recall(evaluator, classes, kind).savefig(file, dpi=110, format="png")
    drawn = write_worst_images(evaluator, dataset, classes, folder / "worst")
    files = ", ".join(["detections.json", *curves])
    log(f"wrote {files} and {counted(drawn, 'picture')} in worst/ to {folder}", "green")


def write_test_results(evaluator: CocoEvaluator, classes: Classes, folder: Path) -> None:
    """Write the detections of a test set as COCO's evaluation server expects them, on the main process only."""
    if not is_main_process():
        return
    write_coco_results(folder / TEST_RESULTS, results_of(evaluator, classes))
    log(f"wrote {folder / TEST_RESULTS}: zip it and upload it to COCO's evaluation server", "green")


def results_of(
    evaluator: CocoEvaluator,
    classes: Classes,
    with_names: bool = False,
    own_id: Callable[[int], int | str] = lambda image_id: image_id,
) -> Iterator[dict[str, Any]]:
    """Yield all detections in COCO's result format; `own_id` returns the id of an image in the annotation file."""
    for image_id in sorted(evaluator.detections):
        detections = evaluator.detections[image_id]
        found = ((int(label), score, box) for label, score, *box in detections.rows[:, :6].tolist())
        yield from coco_results(own_id(image_id), found, classes, with_names, detections.masks())


def write_worst_images(evaluator: CocoEvaluator, dataset: CocoDetection, classes: Classes, folder: Path) -> int:
    """Draw the worst images, replace pictures of an earlier evaluation, and return their number."""
    for old in folder.glob("[0-9][0-9]_*.jpg"):
        old.unlink()
    worst = worst_images(evaluator, dataset, WORST)
    for rank, (position, comparison) in enumerate(worst, start=1):
        name = re.sub(r"[^\w.-]", "_", str(dataset.own_id(dataset.ids[position])))
        with replacing(folder / f"{rank:02}_{name}.jpg") as file:
            draw_image(dataset, classes, position, comparison).save(file, "JPEG", quality=90)
    return len(worst)


def precision_recall(evaluator: CocoEvaluator, classes: Classes, iou_type: str = "bbox") -> Figure:
    """Return a figure of precision over recall (mean of all classes), next to AP per class, the highest first."""
    by_class = {label: ap for label, ap in evaluator.average_precision(iou_type).items() if not np.isnan(ap)}
    best_first = sorted(by_class.items(), key=lambda item: -item[1])
    shown = shown_bars([(classes.name_of(label), ap) for label, ap in best_first])
    figure = Figure(figsize=(9, max(3.6, 0.8 + 0.19 * len(shown))), layout="constrained")
    curves, ranking = figure.subplots(1, 2)
    _draw_curves(curves, evaluator.coco_eval[iou_type])
    draw_bars(ranking, shown, "AP")
    if iou_type == "segm":
        figure.suptitle("Masks")
    return figure


def _draw_curves(axes: Axes, coco_eval: COCOeval) -> None:
    thresholds, recalls = coco_eval.params.iouThrs, coco_eval.params.recThrs
    precision = coco_eval.eval["precision"][:, :, :, 0, AT_100]  # [thresholds, recalls, classes]
    precision = precision[:, :, (precision > -1).any((0, 1))]
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision and recall")
    axes.grid(alpha=0.3)
    if precision.shape[2] == 0:
        axes.text(0.5, 0.5, "no ground truth", ha="center")
        return
    for name, chosen in (("0.50", thresholds == 0.5), ("0.75", thresholds == 0.75), ("0.50 to 0.95", thresholds > 0)):
        curve = precision[chosen].mean((0, 2))
        axes.plot(recalls, curve, label=f"IoU {name}: AP {curve.mean():.3f}")
    axes.figure.legend(loc="outside lower left", ncols=3, fontsize=9, frameon=False)


def shown_bars(bars: list[Bar]) -> list[Bar]:
    """Return at most `MOST_BARS` bars of a ranking: all, or the first and last ones with a line between them."""
    half = MOST_BARS // 2
    if len(bars) <= MOST_BARS:
        return bars
    return [*bars[:half], (f".. {len(bars) - 2 * half} more", None), *bars[-half:]]


def draw_bars(axes: Axes, bars: list[Bar], metric: str) -> None:
    """Draw a bar per class, from top to bottom."""
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 2]}.." for name, _ in bars]
    drawn = axes.barh(range(len(bars)), [ap or 0 for _, ap in bars])
    axes.bar_label(drawn, ["" if ap is None else f"{ap:.3f}" for _, ap in bars], padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set(xlim=(0, 1.12), xlabel=metric, title=f"{metric} by class")
    axes.margins(y=0.02)
    axes.invert_yaxis()
