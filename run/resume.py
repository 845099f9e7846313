"""From `--resume` to the point where a run goes on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from checkpoints.checkpoint import (
    IMAGE_SIZES,
    MODEL_FLAGS,
    TRAINING_FLAGS,
    changed_flags,
    check_finite,
    check_stored_flags,
    load_checkpoint,
    load_latest_checkpoint,
    num_classes_of,
    stored_flags,
)
from flags.parser import given_flags
from run.log_file import read_log
from util.distributed import all_gather_plain, is_main_process
from util.errors import InputError
from util.logger import log, warn
from util.text import counted

Checkpoint = dict[str, Any]


def read_checkpoint(args: argparse.Namespace) -> tuple[Checkpoint | None, str]:
    """The checkpoint that `--resume` names, and where it came from; (None, "") where there is none.

    The main process chooses for all, which may see the folder at different moments.
    """
    resume_by_default(args)
    training = not args.eval
    if args.resume == "auto":
        found = load_latest_checkpoint(args.output_dir, warn, training) if is_main_process() else None
        source = all_gather_plain(found and str(found[1]))[0]
        if source is None:
            log(f"--resume auto: no checkpoint in {args.output_dir}, starting anew")
            return None, ""
        checkpoint = found[0] if found else load_checkpoint(source, training)
    elif args.resume:
        checkpoint, source = load_checkpoint(args.resume, training), args.resume
    else:
        return None, ""
    check_same_on_all(checkpoint, source)
    take_model_flags(args, checkpoint, source)
    if args.eval:
        check_finite(checkpoint["model"], source)
    if not args.eval and (changed := changed_flags(args, checkpoint, TRAINING_FLAGS)):
        warn(f"going on from {source} with other flags: {'; '.join(changed)}")
    epochs = f", {counted(checkpoint['epoch'] + 1, 'epoch')} trained" if "epoch" in checkpoint else ""
    steps = f" and {counted(checkpoint['step'], 'step')}" if checkpoint.get("step") else ""
    log(f"loading {source}{epochs}{steps}")
    return checkpoint, source


def take_model_flags(args: argparse.Namespace, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Set the flags that define a model to those that the checkpoint's model was built with, and print them.

    An evaluation takes the size of images as well, if none was set on purpose.

    Raises:
        InputError: for a flag that was set on purpose and contradicts the checkpoint's model, with both values.
    """
    given, stored = given_flags(args), stored_flags(checkpoint)
    if contradictions := changed_flags(args, checkpoint, [flag for flag in MODEL_FLAGS if flag in given]):
        raise InputError(f"{source} is of another model: {'; '.join(contradictions)}; drop the flag")
    wanted = MODEL_FLAGS if not args.eval or given & set(IMAGE_SIZES) else (*MODEL_FLAGS, *IMAGE_SIZES)
    taken = {flag: stored[flag] for flag in wanted if flag in stored and getattr(args, flag) != stored[flag]}
    vars(args).update(taken)
    check_stored_flags(args, source)
    if taken:
        texts = (f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in taken.items())
        log(f"flags of {source}: {' '.join(texts)}")


def resume_by_default(args: argparse.Namespace) -> None:
    """Makes a run that torchrun may restart go on by itself, and keeps any other from writing over checkpoints.

    Raises InputError for a new run in the folder of another one.
    """
    if args.eval or args.resume or not args.output_dir:
        return
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        args.resume = "auto"
        return
    if all_gather_plain(has_checkpoint(args.output_dir))[0]:
        raise InputError(
            f"--output_dir {args.output_dir} holds the checkpoints of a run: go on with it by --resume auto, "
            "or name another folder"
        )


def has_checkpoint(output_dir: str) -> bool:
    """Return whether a run has written a checkpoint to its folder."""
    return any(Path(output_dir, f"checkpoint{name}.pth").exists() for name in ("", "_previous"))


def how_to_resume(args: argparse.Namespace) -> str:
    """Return what the user of a stopped run can do next, as the end of a line."""
    if args.eval:
        return "the evaluation is not finished"
    if not args.output_dir:
        return "nothing was saved: there is no --output_dir"
    if not has_checkpoint(args.output_dir):
        return "nothing was saved yet: the run begins again"
    return "to resume, repeat the command" + (" with --resume auto" if args.resume != "auto" else "")


def check_same_on_all(checkpoint: Checkpoint, source: str) -> None:
    """Raises InputError where processes have read different files under one name."""
    places = all_gather_plain([checkpoint.get("epoch"), checkpoint.get("step")])
    if different := [rank for rank, place in enumerate(places) if place != places[0]]:
        raise InputError(
            f"{source}: process {different[0]} reads another file under this name than process 0; "
            "the folder must be shared by all nodes"
        )


def holds_training(checkpoint: Checkpoint) -> bool:
    """Whether training can go on from a checkpoint; else its model is where a new one starts."""
    return "optimizer" in checkpoint and "epoch" in checkpoint


def first_epoch(checkpoint: Checkpoint, source: str, args: argparse.Namespace) -> int:
    """Where training goes on: behind the checkpoint's epoch, or at `--start_epoch` where it holds only a model."""
    if holds_training(checkpoint):
        return checkpoint["epoch"] + 1
    warn(f"{source} holds a model but no state of the training: its weights are where a new run starts")
    return args.start_epoch


def unlogged_epoch(checkpoint: Checkpoint | None, source: str, output_dir: Path | None) -> bool:
    """Whether the run was interrupted between an epoch's checkpoint and its line in the log."""
    if not checkpoint or "train_stats" not in checkpoint or not output_dir:
        return False
    logged = [entry["epoch"] for entry in read_log(output_dir / "log.txt")]
    missing = Path(source).parent.resolve() == output_dir.resolve() and checkpoint["epoch"] not in logged
    return all_gather_plain(missing)[0]


def choose_num_classes(args: argparse.Namespace, checkpoint: Checkpoint | None, source: str, needed: int) -> int:
    """The size of the class head: the checkpoint's, else `--num_classes`, else what the data needs."""
    if checkpoint is None:
        return needed if args.num_classes is None else args.num_classes
    stored = num_classes_of(checkpoint, source)
    if args.num_classes not in (None, stored):
        raise InputError(f"--num_classes {args.num_classes} contradicts the {counted(stored, 'class')} of {source}")
    return stored
