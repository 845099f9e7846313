"""Summary of a training run: its best result, its files, and the commands that use its model."""

from __future__ import annotations

import shlex
from pathlib import Path

from flags.resolve import Flags, defaults
from run.log_file import best_score

EVALUATION_FLAGS = (
    *(
        "dataset_file",
        "coco_path",
        "coco_panoptic_path",
        "val_images",
        "val_annotations",
        "remove_difficult",
        "on_bad_image",
        "max_megapixels",
        "device",
    ),
)


def summary(flags: Flags, output_dir: Path) -> list[str]:
    """Return the lines at the end of a run.

    Args:
        flags: the flags of the run.
        output_dir: the folder of its files.
    """
    latest, log = output_dir / "checkpoint.pth", output_dir / "log.txt"
    best = best_score(log)
    model = output_dir / "checkpoint_best.pth" if best else latest
    lines = []
    if best:
        lines.append(f"best {best.metric} on val: {best.value:.3f}, in epoch {best.epoch}: {model}")
    lines.append(f"last epoch: {latest}; log: {log}")
    if not flags.overfit:
        lines.append(
            f"evaluate: {shlex.join(['python', 'main.py', '--eval', '--resume', str(model), *changed(flags)])}"
        )
    predict = ["python", "-m", "scripts.predict", "--checkpoint", str(model), "--output", "predictions"]
    return [*lines, f"predict: {shlex.join(predict)} IMAGES"]


def changed(flags: Flags) -> list[str]:
    """Return the flags that an evaluation on the same data needs, as on a command line."""
    default = defaults()
    values = {name: getattr(flags, name) for name in EVALUATION_FLAGS if getattr(flags, name) != default[name]}
    return [part for name, value in values.items() for part in ([f"--{name}"] + [str(value)] * (value is not True))]
