"""Panoptic quality (Kirillov et al., CVPR 2019) of the predictions of all processes, computed by hotcoco."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from hotcoco.panoptic import PanopticEval

from datasets.classes import Classes
from datasets.coco_eval import columns_of
from datasets.panoptic import PanopticDetection
from evaluation.panoptic_results import png_and_segments, write_panoptic_results
from util.distributed import all_gather_plain, all_gather_rows, is_main_process
from util.errors import InputError, reason
from util.logger import log
from util.text import counted

GROUPS = {"All": "PQ_all", "Things": "PQ_th", "Stuff": "PQ_st"}  # hotcoco's name: name in the log
PARTS = ("pq", "sq", "rq", "n")


class PanopticEvaluator:
    """Evaluator that scores exactly the images passed to `update`, each once.

    Call `update` for every batch, then `synchronize_between_processes`, `accumulate` and `summarize`.

    Args:
        dataset: the ground truth; its PNG files are read again for scoring.
        folder: the folder for a PNG file per image and `predictions.json`, in COCO's format; None: they are not kept.
        classes: the classes of the model and the data; by default, the classes of the data.

    Attributes:
        predictions: by image id, the PNG file and the segments, with labels as category ids.
        results: after `accumulate`, hotcoco's results: PQ, SQ, RQ and the number of classes for `All`, `Things` and
            `Stuff`, and `per_class` by label (as a text).
    """

    def __init__(self, dataset: PanopticDetection, folder: Path | None, classes: Classes | None = None) -> None:
        self.dataset = dataset
        self.folder = folder
        self.classes = classes or dataset.classes
        self.predictions: dict[int, tuple[bytes, list[dict[str, Any]]]] = {}
        self.results: dict[str, Any] = {}

    def update(self, predictions: dict[int, dict[str, Any]]) -> None:
        """Add {image id: prediction}, whose `panoptic` is a result of `PostProcessPanoptic`."""
        for image_id, prediction in predictions.items():
            self.predictions[image_id] = png_and_segments(prediction["panoptic"])

    def synchronize_between_processes(self) -> None:
        """Give every process the predictions of all processes; an image that several of them saw counts once."""
        own = [[image_id, len(png), segments] for image_id, (png, segments) in self.predictions.items()]
        files = bytearray().join(png for png, _ in self.predictions.values())  # tensors are made of writable bytes
        all_files = all_gather_rows(torch.tensor(files, dtype=torch.uint8)).numpy().tobytes()
        self.predictions, start = {}, 0
        for image_id, length, segments in (entry for of_process in all_gather_plain(own) for entry in of_process):
            self.predictions[image_id] = all_files[start : start + length], segments
            start += length

    def accumulate(self) -> None:
        """Score the predictions on the main process, and give every process the results."""
        results: dict[str, Any] = {}
        if is_main_process():
            with contextlib.ExitStack() as stack:
                folder = self.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                results = self._score(folder)
        self.results = all_gather_plain(results)[0]

    def _score(self, folder: Path) -> dict[str, Any]:
        """Write the predictions and return the results of hotcoco, which reads the PNG files."""
        truth = self.dataset.truth(self.predictions.keys(), self.classes)
        predicted = [self.entry_of(image_id) for image_id in sorted(self.predictions)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in predicted:
                (folder / entry["file_name"]).write_bytes(self.predictions[entry["image_id"]][0])
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({reason(error)})") from error
        if self.folder:
            write_panoptic_results(folder / "predictions.json", predicted, self.classes)
        results = self._compare(truth, predicted, folder)
        per_class = {str(label): values for label, values in results["per_class"].items()}
        return {group: results[group] for group in GROUPS} | {"per_class": per_class}

    def _compare(self, truth: dict[str, Any], predicted: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Return hotcoco's results for predictions whose PNG files are in `folder`."""
        files = {"gt_folder": self.dataset.segments_folder, "pred_folder": folder}
        evaluation = PanopticEval(truth, {"annotations": predicted}, **files)
        evaluation.evaluate()
        return evaluation.results()

    def quality_of_image(self, image_id: int) -> float | None:
        """Return the PQ of a single image, after `accumulate` with a folder; None if it has no segments."""
        assert self.folder is not None
        results = self._compare(self.dataset.truth({image_id}, self.classes), [self.entry_of(image_id)], self.folder)
        return results["All"]["pq"] if results["All"]["n"] else None

    def entry_of(self, image_id: int) -> dict[str, Any]:
        """Return an image's prediction as an entry of a panoptic annotation file, with labels as category ids."""
        return {
            "image_id": image_id,
            "file_name": f"{image_id:012}.png",
            "segments_info": self.predictions[image_id][1],
        }

    def summarize(self) -> None:
        """Print PQ, SQ and RQ of all classes, of things and of stuff, and the PQ of each class."""
        log("panoptic quality")
        for group, key in GROUPS.items():
            values = self.stats[key]
            numbers = "  ".join(f"{name.upper()} {values[name]:.3f}" for name in ("pq", "sq", "rq"))
            log(f" {group:<6}  {numbers}  {counted(int(values['n']), 'class')}")
        scored = [(self.classes.name_of(label), pq) for label, pq in self.quality_by_class().items()]
        log("\n ".join(["PQ by class:", *columns_of(scored)]))

    @property
    def stats(self) -> dict[str, dict[str, float]]:
        """`PQ_all`, `PQ_th` and `PQ_st`: PQ, SQ, RQ and the number of classes, `{pq, sq, rq, n}`."""
        return {key: {name: self.results[group][name] for name in PARTS} for group, key in GROUPS.items()}

    def quality_by_class(self) -> dict[int, float]:
        """Return {label: PQ} of the classes that have ground truth or predictions."""
        per_class = self.results["per_class"]
        return {int(label): values["pq"] for label, values in per_class.items() if values["pq"] >= 0}
