"""The end of a training run: what it reached, where its files are, and the commands to use its model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from run.log_file import best_epoch

EVALUATION_FLAGS = (
    *("coco_path", "val_images", "val_annotations", "remove_difficult", "on_bad_image", "max_megapixels", "device"),
)


def summary(args: argparse.Namespace, defaults: dict[str, Any], output_dir: Path) -> list[str]:
    """Return the lines that end a run.

    Args:
        args: the flags of the run.
        defaults: the default of every flag.
        output_dir: the folder of its files.
    """
    latest, log = output_dir / "checkpoint.pth", output_dir / "log.txt"
    ap, epoch = best_epoch(log)
    model = output_dir / "checkpoint_best.pth" if ap >= 0 else latest
    lines = []
    if ap >= 0:
        lines.append(f"best AP on val: {ap:.3f}, in epoch {epoch}: {model}")
    lines.append(f"last epoch: {latest}; log: {log}")
    if not args.overfit:
        lines.append(
            f"evaluate: {shlex.join(['python', 'main.py', '--eval', '--resume', str(model), *changed(args, defaults)])}"
        )
    predict = ["python", "-m", "scripts.predict", "--checkpoint", str(model), "--output", "predictions"]
    return [*lines, f"predict: {shlex.join(predict)} IMAGES"]


def changed(args: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    """Return the flags that an evaluation on the same data needs, as on a command line."""
    values = {flag: getattr(args, flag) for flag in EVALUATION_FLAGS if getattr(args, flag) != defaults[flag]}
    return [part for flag, value in values.items() for part in ([f"--{flag}"] + [str(value)] * (value is not True))]
