"""Convert a model to another format.

Usage: python -m scripts.convert conditional_detr_resnet50 output/hf_r50 --to transformers
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("convert")

from collections.abc import Sequence

from checkpoints.checkpoint import load_checkpoint
from checkpoints.huggingface import write_folder
from checkpoints.safetensors_file import write_safetensors
from scripts.detector import build_detector
from util.command import run_command
from util.errors import InputError
from util.files import save_on_master
from util.logger import log
from util.text import counted

SUFFIXES = {"transformers": "", "safetensors": ".safetensors", "checkpoint": ".pth"}
FOR_INFERENCE = ("model", "args", "class_ids", "class_names", "class_isthing")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parse_flags("convert", argv)
    convert(flags.source, flags.target, flags.to)


def convert(source: str, target: Path, to: str) -> None:
    """Write the model of `source`, anything that `load_checkpoint` reads, to `target`, in a format of `SUFFIXES`.

    Raises:
        InputError: if the target exists or has the wrong suffix, the source is not usable, or the format does not
            support its model.
    """
    check_target(target, to)
    checkpoint = load_checkpoint(source)
    detector = build_detector(checkpoint, source)  # checks that flags and weights belong together
    checkpoint = {key: checkpoint[key] for key in FOR_INFERENCE if key in checkpoint}
    if to == "transformers":
        write_folder(target, checkpoint["model"], detector.args, detector.classes)
    elif to == "safetensors":
        write_safetensors(target, checkpoint)
    else:
        save_on_master(checkpoint, target)
    args, classes = detector.args, counted(len(detector.classes.names), "class")
    log(f"{target}: {args.model}, {args.backbone}{' dilated' if args.dilation else ''}, {classes}", "green")


def check_target(target: Path, to: str) -> None:
    """Raise InputError if the target exists and is not an empty folder, or if its suffix is not the format's."""
    if SUFFIXES[to] and target.suffix != SUFFIXES[to]:
        raise InputError(f"{target}: --to {to} writes a file, name it *{SUFFIXES[to]}")
    if target.exists() and (SUFFIXES[to] or not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; move it away, or name another target")


if __name__ == "__main__":
    run_command(main)
