"""Curves and pictures of a run for TensorBoard, a library that only this module needs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.command import need
from util.errors import InputError, reason
from util.files import check_folder
from util.logger import MetricLogger, is_shown
from util.text import printable

COCO_NUMBERS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L")
COCO_GROUPS = {
    "coco_eval_bbox": "coco",
    "coco_eval_masks": "coco_masks",
}  # the group of charts for each list in the log
FLUSH_SECONDS = 10  # so that curves are almost live
PARTS = {"train": "train_", "val": "test_"}  # TensorBoard's runs, and the prefix of their keys in the log


class TensorBoard:
    """Writer of TensorBoard's runs: `train` and `val` per epoch, in the same charts, and `steps` per step.

    Args:
        folder: the folder to write to; None: nothing is written.
        draw: returns the pictures of an evaluation, each with its name.

    At the end of a `with` block, everything that is still buffered is written.

    The methods raise InputError if the folder cannot be written to, or was deleted.
    """

    def __init__(self, folder: Path | None, draw: Callable[[Any], Iterable[tuple[str, Image.Image]]]) -> None:
        self.folder = folder
        self.draw = draw
        self.writers: dict[str, Any] = {}

    def begin(self, epochs: int, steps: int) -> None:
        """Continue after `epochs` and `steps`; TensorBoard hides later values of an earlier run."""
        if self.folder:
            writer = need("torch.utils.tensorboard", "tensorboard", "--tensorboard").SummaryWriter
            for name, finished in {**dict.fromkeys(PARTS, epochs), "steps": steps}.items():
                with self._writing():
                    self.writers[name] = writer(self.folder / name, purge_step=finished + 1, flush_secs=FLUSH_SECONDS)

    def write_step(self, steps: int, logger: MetricLogger) -> None:
        """Write the averages over the latest steps; the run has taken `steps` in all."""
        if self.writers:
            averages = {name: meter.avg for name, meter in logger.shown().items() if meter.window}
            self._write("steps", "steps", averages, steps)

    def write_epoch(self, epochs: int, entry: dict[str, Any], evaluator: Any) -> None:
        """Write the epoch's entry of the log, and pictures of its evaluation; `evaluator` is None without one."""
        if not self.writers:
            return
        for part, prefix in PARTS.items():
            values = {name.removeprefix(prefix): v for name, v in entry.items() if name.startswith(prefix)}
            for key, group in COCO_GROUPS.items():
                numbers = dict(zip(COCO_NUMBERS, values.pop(key, ()), strict=False))
                known = {name: value for name, value in numbers.items() if value >= 0}  # -1: nothing to find
                self._write(part, group, known, epochs)
            for key in [key for key, value in values.items() if isinstance(value, dict)]:  # of other evaluators
                self._write(part, key, values.pop(key), epochs)
            self._write(part, "epochs", {name: value for name, value in values.items() if is_shown(name)}, epochs)
        for name, picture in self.draw(evaluator) if evaluator else ():
            with self._writing():
                self.writers["val"].add_image(
                    f"images/{printable(str(name))}", np.asarray(picture), epochs, dataformats="HWC"
                )
        with self._writing():
            for writer in self.writers.values():
                writer.flush()

    def _write(self, run: str, group: str, values: dict[str, float], step: int) -> None:
        with self._writing():
            for name, value in values.items():
                self.writers[run].add_scalar(f"{group}/{name}", value, step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        assert self.folder is not None  # else there are no writers
        check_folder(self.folder)
        try:
            yield
        except Exception as error:  # OSError, or one of TensorFlow's own types if that is installed
            check_folder(self.folder)
            raise InputError(f"{self.folder}: cannot be written ({reason(error)})") from error

    def __enter__(self) -> TensorBoard:
        self.excepthook, threading.excepthook = threading.excepthook, self._report
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for writer in self.writers.values():
                # The error that ends the run is more important than one that follows it.
                with contextlib.suppress(*[InputError] * (kind is not None)), self._writing():
                    writer.close()
        finally:
            threading.excepthook = self.excepthook

    def _report(self, failure: threading.ExceptHookArgs) -> None:
        """Ignore errors of the writers' own threads, which the next call of the writer raises."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.excepthook(failure)
