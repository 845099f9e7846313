"""COCO average precision over the predictions of all processes.

Predictions are collected as arrays, gathered from all processes as tensors, and scored once at the end by compiled code
that returns the numbers of pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from models.postprocess import check_detections
from util.distributed import all_gather_rows
from util.logger import log

COCO_DETECTIONS = 100  # per image, for the 12 COCO numbers
PARAMETERS = ("catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl", "useCats")
AT_100 = 2  # position of 100 in pycocotools' maxDets: 1, 10, 100


class Detections(NamedTuple):
    """The detections of one image.

    rows: [N, 9] float64: category id, score, x, y, width, height; height, width and length in bytes of the mask's
        run-length code (zeros without masks).
    codes: the codes of all masks, concatenated.
    """

    rows: np.ndarray
    codes: bytes

    def of_categories(self, category_ids: Sequence[int]) -> Detections:
        """Return the detections of some categories."""
        kept = np.isin(self.rows[:, 0], category_ids)
        if kept.all():
            return self
        masks = self.masks()
        codes = b"".join(mask["counts"] for mask, is_kept in zip(masks, kept, strict=True) if is_kept) if masks else b""
        return Detections(self.rows[kept], codes)

    def masks(self) -> list[dict[str, Any]]:
        """Return COCO's run-length codes of the N masks; an empty list without masks."""
        if not self.codes:
            return []
        sizes = self.rows[:, 6:8].astype(int).tolist()
        ends = self.rows[:, 8].cumsum().astype(int).tolist()
        parts = zip(sizes, [0, *ends], ends, strict=False)
        return [{"size": size, "counts": self.codes[start:end]} for size, start, end in parts]


def box_results(detections: Sequence[Detections]) -> np.ndarray:
    """Return boxes as pycocotools' results, [N, 7]: image number, x, y, width, height, score, category id."""
    columns = [2, 3, 4, 5, 1, 0]  # of `Detections.rows`
    parts = [np.insert(found.rows[:, columns], 0, number, axis=1) for number, found in enumerate(detections, start=1)]
    return np.concatenate([np.zeros((0, 7)), *parts])


def mask_results(detections: Sequence[Detections]) -> list[dict[str, Any]]:
    """Return masks as pycocotools' results; without boxes, areas are those of the masks."""
    return [
        {"image_id": number, "category_id": int(category), "score": score, "segmentation": mask}
        for number, found in enumerate(detections, start=1)
        for (category, score), mask in zip(found.rows[:, :2].tolist(), found.masks(), strict=True)
    ]


RESULTS: dict[str, Callable[[Sequence[Detections]], Any]] = {"bbox": box_results, "segm": mask_results}


class CocoEvaluator:
    """Evaluator that scores exactly the images passed to `update`, each once, with or without detections.

    Call `update` for every batch, then `synchronize_between_processes`, `accumulate` and `summarize`; the scores are
    then in `coco_eval[iou_type].stats` and `.eval`, as in pycocotools. `coco_eval[iou_type].params` may be set before.

    Args:
        coco_gt: the ground truth.
        iou_types: any of "bbox" and "segm".
        max_detections: if it exceeds COCO's 100 per image, AP and AR at this number are printed as well.
    """

    def __init__(self, coco_gt: COCO, iou_types: list[str] | tuple[str, ...], max_detections: int = 100) -> None:
        self.coco_gt = coco_gt
        self.iou_types = tuple(iou_types)
        self.coco_eval = {iou_type: COCOeval(coco_gt, iouType=iou_type) for iou_type in self.iou_types}
        if max_detections > COCO_DETECTIONS:
            for coco_eval in self.coco_eval.values():
                coco_eval.params.maxDets = [*coco_eval.params.maxDets, max_detections]
        self.detections: dict[int, Detections] = {}

    def update(self, predictions: dict[int, dict[str, Tensor]]) -> None:
        """Add {image id: prediction}.

        A prediction holds `scores` [N], `labels` [N], `boxes` [N, 4] as xyxy in pixels and, for "segm", `masks`
        [N, H, W] or [N, 1, H, W], which count as set where they exceed 0.5.
        """
        for image_id, prediction in predictions.items():
            check_detections(prediction, f"image id {image_id}")
            scores, labels, boxes = (prediction[key].detach().cpu().double() for key in ("scores", "labels", "boxes"))
            boxes = boxes.reshape(-1, 4)
            columns = [labels[:, None], scores[:, None], boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]
            masks = encode_masks(prediction["masks"]) if "segm" in self.iou_types else []
            mask_columns = [[*mask["size"], len(mask["counts"])] for mask in masks] or torch.zeros(len(scores), 3)
            rows = torch.cat([*columns, torch.as_tensor(mask_columns).double()], dim=1).numpy()
            self.detections[int(image_id)] = Detections(rows, b"".join(mask["counts"] for mask in masks))

    def synchronize_between_processes(self) -> None:
        """Give every process the detections of all processes; an image that several of them saw counts once."""
        images = [[image_id, len(d.rows), len(d.codes)] for image_id, d in self.detections.items()]
        rows = np.concatenate([np.zeros((0, 9)), *(d.rows for d in self.detections.values())])
        codes = bytearray().join(d.codes for d in self.detections.values())  # tensors are made of writable bytes
        images = all_gather_rows(torch.tensor(images, dtype=torch.int64).view(-1, 3)).tolist()
        rows = all_gather_rows(torch.from_numpy(rows)).numpy()
        all_codes = all_gather_rows(torch.tensor(codes, dtype=torch.uint8)).numpy().tobytes()
        self.detections = {}
        row = byte = 0
        for image_id, num_rows, num_bytes in images:
            self.detections[image_id] = Detections(rows[row : row + num_rows], all_codes[byte : byte + num_bytes])
            row, byte = row + num_rows, byte + num_bytes

    def accumulate(self) -> None:
        """Match detections with the ground truth and compute precision and recall."""
        image_ids = sorted(self.detections)
        category_ids = [entry["id"] for entry in self.coco_gt.dataset["categories"]]
        detections = [self.detections[image_id].of_categories(category_ids) for image_id in image_ids]
        for iou_type, coco_eval in self.coco_eval.items():
            truth = hotcoco.COCO(numbered(self.coco_gt.dataset, image_ids, iou_type))
            scorer = hotcoco.COCOeval(truth, truth.load_res(RESULTS[iou_type](detections)), iou_type)
            for name in PARAMETERS:
                setattr(scorer.params, name, np.asarray(getattr(coco_eval.params, name)).tolist())
            scorer.evaluate()
            scorer.accumulate()
            coco_eval.params.imgIds = image_ids
            assert scorer.eval is not None
            coco_eval.eval = scorer.eval | {"params": coco_eval.params}

    def summarize(self) -> None:
        """Print the 12 COCO numbers and AP per class; leave the numbers in `coco_eval[iou_type].stats`."""
        for iou_type, coco_eval in self.coco_eval.items():
            table = io.StringIO()
            with contextlib.redirect_stdout(table):
                coco_eval.summarize()
            log(f"IoU metric: {iou_type}")
            log(table.getvalue().rstrip())
            if len(coco_eval.params.maxDets) > 3:
                log(more_detections(coco_eval))
            log(self.class_table(iou_type))

    @property
    def stats(self) -> dict[str, list[float]]:
        """The 12 COCO numbers of each IoU type, under `coco_eval_bbox` and `coco_eval_masks`."""
        names = {"bbox": "coco_eval_bbox", "segm": "coco_eval_masks"}  # as published
        return {names[kind]: list(map(float, result.stats)) for kind, result in self.coco_eval.items()}

    def average_precision(self, iou_type: str) -> dict[int, float]:
        """Return AP (all areas, 100 detections) by category id; NaN for a class without ground truth."""
        coco_eval = self.coco_eval[iou_type]
        precision = coco_eval.eval["precision"][:, :, :, 0, AT_100]  # thresholds × recalls × classes
        return {
            category: float(p[p > -1].mean()) if (p > -1).any() else float("nan")
            for category, p in zip(coco_eval.params.catIds, np.moveaxis(precision, 2, 0), strict=True)
        }

    def class_table(self, iou_type: str) -> str:
        """Return a table of the name and AP of every class that has ground truth."""
        names = {entry["id"]: entry["name"] for entry in self.coco_gt.dataset["categories"]}
        scored = [(names[k], ap) for k, ap in self.average_precision(iou_type).items() if not np.isnan(ap)]
        return "\n ".join(["AP by class:", *columns_of(scored)])


def numbered(dataset: dict[str, Any], image_ids: Sequence[int], kind: str) -> dict[str, Any]:
    """Return the ground truth of some images, numbered from 1: arrays of float64 do not hold all 64-bit ids.

    Only the fields that the scores of boxes ("bbox") or masks ("segm") need are kept; others may contain anything.
    """
    numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
    fields = ["id", "category_id", "bbox", "area", "iscrowd", *["segmentation"] * (kind == "segm")]
    images = [
        {"id": numbers[image["id"]], "width": image.get("width") or 0, "height": image.get("height") or 0}
        for image in dataset["images"]
        if image["id"] in numbers
    ]
    annotations = [
        {name: entry[name] for name in fields} | {"image_id": numbers[entry["image_id"]]}
        for entry in dataset["annotations"]
        if entry["image_id"] in numbers
    ]
    categories = [{"id": entry["id"], "name": str(entry["name"])} for entry in dataset["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def columns_of(scored: Sequence[tuple[str, float]], columns: int = 4) -> list[str]:
    """Return the lines of a table of classes, each with its score."""
    width = max((len(name) for name, _ in scored), default=0)
    cells = [f"{name:<{width}} {score:.3f}" for name, score in scored]
    lines = ["   ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return lines or ["no class has ground truth"]


def more_detections(coco_eval: COCOeval) -> str:
    """Return AP and AR at the largest number of detections per image, in the format of the 12 COCO numbers."""
    most = coco_eval.params.maxDets[-1]
    lines = []
    for title, short, scores in (("Precision", "AP", "precision"), ("Recall", "AR", "recall")):
        values = coco_eval.eval[scores][..., 0, -1]
        value = values[values > -1].mean() if (values > -1).any() else -1
        lines.append(
            f" Average {title:<9} ({short}) @[ IoU=0.50:0.95 | area=   all | maxDets={most:>3} ] = {value:.3f}"
        )
    return "\n".join(lines)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Convert masks [N, H, W] or [N, 1, H, W] to COCO's run-length codes."""
    masks = masks.detach().cpu().reshape(-1, *masks.shape[-2:])
    return [mask_api.encode(np.asfortranarray((mask > 0.5).numpy().astype(np.uint8))) for mask in masks]


def evaluation_as_plain_data(coco_eval: COCOeval) -> dict[str, Any]:
    """Return pycocotools' `.eval` as tensors and plain data, for a file that loads with `weights_only=True`."""
    arrays = {key: torch.from_numpy(value) for key, value in coco_eval.eval.items() if isinstance(value, np.ndarray)}
    params = {
        key: np.asarray(value).tolist() if isinstance(value, list | np.ndarray) else value
        for key, value in vars(coco_eval.params).items()
    }
    return arrays | {"params": params, "counts": list(coco_eval.eval["counts"]), "date": coco_eval.eval["date"]}
