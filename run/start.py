"""Start of a run: from random weights, from another model's weights, or from a checkpoint of the run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.backbone_weights import load_backbone_weights
from checkpoints.checkpoint import (
    changed_flags,
    check_finite,
    check_stored_flags,
    load_checkpoint,
    load_latest_checkpoint,
    load_model_weights,
    num_classes_of,
    stored_flags,
)
from checkpoints.weight_flags import has_masks
from datasets.classes import Classes
from flags.resolve import IMAGE_SIZES, MODEL_FLAGS, TRAINING_FLAGS, Flags, resolve
from models.backbone import Backbone
from models.detector import Detector
from models.segmentation import DETRsegm
from run.finetune import start_from
from run.log_file import read_log
from util import launcher
from util.distributed import all_gather_plain, is_main_process
from util.errors import InputError
from util.logger import log, warn
from util.text import counted

Checkpoint = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Start of a run: its flags, its checkpoint and its first epoch.

    Attributes:
        flags: the flags of the run; flags that define the model come from the checkpoint.
        checkpoint: the checkpoint that is resumed or evaluated; None for a new training.
        source: the name of the checkpoint in messages.
        other_model: the checkpoint of `--finetune`, for a new training; else None.
        frozen: the checkpoint of `--frozen_weights`, for a new training; else None.
        epoch: the first epoch to train.
        unlogged: the statistics of the epoch before, if the run ended after its checkpoint and before its line in the
            log; else None.
    """

    flags: Flags
    checkpoint: Checkpoint | None = None
    source: str = ""
    other_model: Checkpoint | None = None
    frozen: Checkpoint | None = None
    epoch: int = 0
    unlogged: dict[str, float] | None = None

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint from which training continues; None if a new training starts."""
        return self.checkpoint if self.checkpoint and holds_training(self.checkpoint) else None

    @property
    def given_model(self) -> tuple[Checkpoint | None, str]:
        """The checkpoint that determines the classes of the run, and its name; None if the data do."""
        return (self.checkpoint, self.source) if self.checkpoint else (self.frozen, self.flags.frozen_weights or "")

    @property
    def finished(self) -> bool:
        """True if all epochs are trained and logged."""
        trained = self.resumed is not None and self.epoch >= self.flags.epochs
        return trained and not self.flags.eval and self.unlogged is None

    def num_classes(self, needed: int) -> int:
        """Return the size of the class head: the checkpoint's, else `--num_classes`, else what the data needs."""
        wanted = self.flags.num_classes
        checkpoint, source = self.given_model
        if checkpoint is None:
            return needed if wanted is None else wanted
        stored = num_classes_of(checkpoint, source)
        if wanted not in (None, stored):
            raise InputError(
                f"--num_classes {wanted} contradicts the {counted(stored, 'class')} of {source}: drop the flag"
            )
        return stored

    def fill(self, model: Detector | DETRsegm, classes: Classes) -> None:
        """Load the initial weights of the run into a model; in a new training, only the main process reads them.

        Args:
            model: newly built.
            classes: the classes that it distinguishes.
        """
        flags = self.flags
        if self.checkpoint:
            load_model_weights(model, self.checkpoint, self.source)
        elif self.frozen:
            load_model_weights(model.detector, self.frozen, self.given_model[1])
        elif flags.eval:
            warn("evaluating random weights: name a checkpoint with --resume")
        elif is_main_process():  # the other processes receive the weights from it
            other = self.other_model
            has_backbone = other and start_from(model, classes, other, flags.finetune, flags)
            if flags.backbone_weights != "none" and not has_backbone:
                backbone = model.detector.backbone[0]
                assert isinstance(backbone, Backbone)
                load_backbone_weights(backbone, flags.backbone, flags.backbone_weights)


def find_start(flags: Flags, output_dir: Path | None) -> Start:
    """Read the checkpoint that a run starts from, if there is one, on all processes.

    Raises:
        InputError: if the checkpoint cannot be used, flags contradict it, or there are no epochs left to train.
    """
    if flags.eval:
        flags = resolve(flags, group_detr=1)  # evaluation uses only the first group of queries
    checkpoint, source = read_checkpoint(flags)
    if checkpoint:
        flags = with_model_flags(flags, checkpoint, source)
        announce(flags, checkpoint, source)
    if flags.eval:
        if checkpoint:
            check_finite(checkpoint["model"], source)
        return Start(flags, checkpoint, source)
    unlogged = unlogged_epoch(checkpoint, source, output_dir)
    epoch = first_epoch(checkpoint, source, flags)
    other_model = load_checkpoint(flags.finetune, all_groups=True) if flags.finetune and not checkpoint else None
    frozen = None
    if flags.frozen_weights and not checkpoint:
        frozen = load_detector_to_freeze(flags.frozen_weights)
        flags = with_model_flags(flags, frozen, flags.frozen_weights)
    start = Start(flags, checkpoint, source, other_model, frozen, epoch, unlogged)
    if epoch >= flags.epochs and unlogged is None and not start.finished:
        raise InputError(f"--start_epoch {epoch}: the run has only {counted(flags.epochs, 'epoch')}, counted from 0")
    return start


def load_detector_to_freeze(source: str) -> Checkpoint:
    """Return the checkpoint of a detector without masks, with the flags of a model with masks.

    Raises:
        InputError: if it cannot be used, or has a mask head itself.
    """
    checkpoint = load_checkpoint(source)
    if has_masks(checkpoint["model"]):
        raise InputError(
            f"--frozen_weights {source}: already has a mask head (its detector's weights begin with detr.); "
            "continue its training with --finetune, or name a model without masks"
        )
    check_finite(checkpoint["model"], source)
    return checkpoint | {"args": checkpoint["args"] | {"masks": True}}


def read_checkpoint(flags: Flags) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint that `--resume` names and its source; (None, "") if there is none.

    The main process chooses for all processes, which may see the folder at different moments.
    """
    training = not flags.eval
    resume = what_to_resume(flags)
    if resume == "auto":
        found = load_latest_checkpoint(flags.output_dir, warn, training) if is_main_process() else None
        source = all_gather_plain(found and str(found[1]))[0]
        if source is None:
            log(f"--resume auto: no checkpoint in {flags.output_dir}, starting a new run")
            return None, ""
        checkpoint = found[0] if found else load_checkpoint(source, training)
    elif resume:
        checkpoint, source = load_checkpoint(resume, training), resume
    else:
        check_folder_is_new(flags)
        return None, ""
    check_same_on_all(checkpoint, source)
    return checkpoint, source


def what_to_resume(flags: argparse.Namespace) -> str:
    """Return the value of `--resume`; without it, "auto" for a training that torchrun may restart, else ""."""
    if flags.resume or flags.eval or not flags.output_dir:
        return flags.resume
    return "auto" if launcher.number("TORCHELASTIC_MAX_RESTARTS", 0) > 0 else ""


def check_folder_is_new(flags: Flags) -> None:
    """Raise InputError for a new run in the folder of another run, whose checkpoints it would replace."""
    if not flags.eval and flags.output_dir and all_gather_plain(has_checkpoint(flags.output_dir))[0]:
        raise InputError(
            f"--output_dir {flags.output_dir} holds the checkpoints of a run: continue it with --resume auto, "
            "or name another folder"
        )


def with_model_flags(flags: Flags, checkpoint: Checkpoint, source: str) -> Flags:
    """Return the flags with the model flags of the checkpoint, and log those that change.

    An evaluation also takes the image sizes from the checkpoint, unless the user has set one.

    Raises:
        InputError: if a flag that the user has set contradicts the checkpoint's model; the message gives both values.
    """
    stored = stored_flags(checkpoint)
    if contradictions := changed_flags(flags, checkpoint, [flag for flag in MODEL_FLAGS if flag in flags.given]):
        raise InputError(f"{source} is of another model: {'; '.join(contradictions)}; drop the flag")
    wanted = MODEL_FLAGS if not flags.eval or flags.given & set(IMAGE_SIZES) else (*MODEL_FLAGS, *IMAGE_SIZES)
    taken = {flag: stored[flag] for flag in wanted if flag in stored and getattr(flags, flag) != stored[flag]}
    flags = resolve(flags, **taken)
    check_stored_flags(flags, source)
    if taken:
        texts = (f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in taken.items())
        log(f"flags of {source}: {' '.join(texts)}")
    return flags


def announce(flags: Flags, checkpoint: Checkpoint, source: str) -> None:
    """Log which checkpoint is loaded, and warn if a training continues with other flags."""
    if not flags.eval and (changed := changed_flags(flags, checkpoint, TRAINING_FLAGS)):
        warn(f"continuing from {source} with other flags: {'; '.join(changed)}")
    epochs = f", {counted(checkpoint['epoch'] + 1, 'epoch')} trained" if "epoch" in checkpoint else ""
    steps = f" and {counted(checkpoint['step'], 'step')}" if checkpoint.get("step") else ""
    log(f"loading {source}{epochs}{steps}")


def has_checkpoint(output_dir: str) -> bool:
    """Return whether a run has written a checkpoint to its folder."""
    return any(Path(output_dir, f"checkpoint{name}.pth").exists() for name in ("", "_previous"))


def how_to_resume(flags: argparse.Namespace) -> str:
    """Return advice for the user of a stopped run, as the end of a line."""
    if flags.eval:
        return "the evaluation is not finished"
    if not flags.output_dir:
        return "nothing was saved: there is no --output_dir"
    if not has_checkpoint(flags.output_dir):
        return "nothing was saved yet: the run begins again"
    return "to resume, repeat the command" + (" with --resume auto" if what_to_resume(flags) != "auto" else "")


def check_same_on_all(checkpoint: Checkpoint, source: str) -> None:
    """Raise InputError if processes have read different files of the same name."""
    places = all_gather_plain([checkpoint.get("epoch"), checkpoint.get("step")])
    if different := [rank for rank, place in enumerate(places) if place != places[0]]:
        raise InputError(
            f"{source}: process {different[0]} reads another file under this name than process 0; "
            "the folder must be shared by all nodes"
        )


def holds_training(checkpoint: Checkpoint) -> bool:
    """Return whether training can continue from a checkpoint."""
    return "optimizer" in checkpoint and "epoch" in checkpoint


def first_epoch(checkpoint: Checkpoint | None, source: str, flags: Flags) -> int:
    """Return the first epoch to train: after the checkpoint's epoch, or `--start_epoch` if it has only a model."""
    if checkpoint and holds_training(checkpoint):
        return checkpoint["epoch"] + 1
    if checkpoint:
        warn(f"{source} holds a model but no state of the training: a new run starts from its weights")
    return flags.start_epoch


def unlogged_epoch(checkpoint: Checkpoint | None, source: str, output_dir: Path | None) -> dict[str, float] | None:
    """Return the statistics of the checkpoint's epoch if the log in the same folder lacks this epoch, else None."""
    if not checkpoint or "train_stats" not in checkpoint or not output_dir:
        return None
    logged = [entry["epoch"] for entry in read_log(output_dir / "log.txt")]
    missing = Path(source).parent.resolve() == output_dir.resolve() and checkpoint["epoch"] not in logged
    return checkpoint["train_stats"] if all_gather_plain(missing)[0] else None
