"""Start of a training from another model's weights: `--finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from checkpoints.checkpoint import changed_flags, check_finite, classes_of, fits, shape_text, stored_flags
from checkpoints.weight_flags import DETECTOR, model_of, of_detector
from datasets.classes import Classes, normalized
from flags.resolve import MODEL_FLAGS
from models.detector import Detector
from models.segmentation import DETRsegm
from util.errors import InputError
from util.logger import log, warn
from util.text import counted

HEADS = ("class_embed.", "bbox_embed.")
CLASS_HEAD = ("class_embed.weight", "class_embed.bias")
QUERIES = "query_embed.weight"
BATCH_COUNTER = "num_batches_tracked"  # only trained norms have this counter, and nothing depends on it


@torch.no_grad()
def start_from(
    model: Detector | DETRsegm, classes: Classes, checkpoint: dict[str, Any], source: str, args: argparse.Namespace
) -> bool:
    """Copy all weights of a checkpoint that fit a model into it, and log the names of those that do not fit.

    Both the checkpoint and the model may be with or without a mask head.

    Rows of the class head are matched by the names of the classes, not by their ids; a class that the checkpoint does
    not know keeps its initial row.

    Args:
        model: newly built.
        classes: the classes of the model.
        checkpoint: the result of `checkpoints.checkpoint.load_checkpoint`.
        source: the name of the checkpoint in messages.
        args: the model's flags, which are compared with the checkpoint's if something does not fit.

    Return whether all weights of the backbone were copied.

    Raise InputError if nothing fits.
    """
    check_finite(checkpoint["model"], source)
    if isinstance(model, DETRsegm):
        fill_head(model, checkpoint["model"], source)
    theirs, ours = of_detector(checkpoint["model"]), model.detector.state_dict()
    theirs = theirs | queries_of_groups(theirs.get(QUERIES), ours[QUERIES], stored_flags(checkpoint), args)
    same_model = model_of(ours) == model_of(theirs)
    apart = CLASS_HEAD if same_model else tuple(name for name in ours if name.startswith(HEADS))  # not comparable
    fitting = [name for name, tensor in ours.items() if name not in apart and fits(tensor, theirs.get(name))]
    if not fitting:
        raise InputError(f"--finetune {source}: none of its weights fits this model")
    for name in fitting:
        ours[name].copy_(theirs[name])
    whole = same_model and has_head(theirs, width=ours[CLASS_HEAD[0]].shape[1])
    rows = matching_rows(classes, classes_of(checkpoint, source)) if whole else []
    no_object = [(-1, -1)] if whole and model_of(ours) == "detr" else []
    for name in CLASS_HEAD:
        for label, their_label in rows + no_object:
            ours[name][label].copy_(theirs[name][their_label])

    wanted = [name for name in ours.keys() | theirs.keys() if name not in apart and BATCH_COUNTER not in name]
    fresh = [name for name in ours if name.startswith(HEADS) and (name not in theirs or not same_model)]
    left_out = sorted(set(wanted) - set(fitting) - set(fresh))
    log(f"starting from {source}: {counted(len(fitting), 'tensor')}; {describe_classes(classes, rows)}")
    if fresh:
        log(f"starting from random weights, because {source} has none for this model: {shortened(fresh)}")
    if left_out:
        changed = "".join(f"; {flag}" for flag in changed_flags(args, checkpoint, MODEL_FLAGS))
        warn(f"not copied: {describe_misfits(left_out, ours, theirs)}{changed}")
    return not any(name.startswith("backbone.0.") for name in left_out)


def fill_head(model: DETRsegm, theirs: dict[str, Tensor], source: str) -> None:
    """Copy the weights of a checkpoint that fit the mask head into it; log how many they are if some do not fit."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(DETECTOR)}
    fitting = [name for name, tensor in ours.items() if fits(tensor, theirs.get(name))]
    for name in fitting:
        ours[name].copy_(theirs[name])
    if len(fitting) < len(ours):
        log(f"the mask head starts from random weights, except for {counted(len(fitting), 'tensor')} of {source}")


def queries_of_groups(
    theirs: Tensor | None, ours: Tensor, stored: dict[str, Any], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Return the queries of a checkpoint, by their key, for a model with another number of groups (Group DETR).

    The first groups come from the checkpoint; groups that it lacks keep their initial queries. The result is empty if
    the numbers of groups are equal, or if the sizes of the groups differ.
    """
    groups = stored.get("group_detr", 1)
    if theirs is None or groups == args.group_detr or theirs.shape[0] * args.group_detr != ours.shape[0] * groups:
        return {}
    log(f"groups of queries: {args.group_detr} instead of {groups}; the first {min(args.group_detr, groups)} are kept")
    return {QUERIES: torch.cat([theirs[: len(ours)], ours[len(theirs) :].to(theirs)])}


def has_head(weights: dict[str, Tensor], width: int) -> bool:
    """Return whether the weights contain a complete class head whose rows fit a model of this width."""
    weight, bias = (weights.get(name) for name in CLASS_HEAD)
    if weight is None or bias is None or bias.dim() != 1:
        return False
    return weight.shape == (len(bias), width) and weight.is_floating_point() and bias.is_floating_point()


def matching_rows(ours: Classes, theirs: Classes) -> list[tuple[int, int]]:
    """Return the pairs (our label, their label) of classes with the same name, ignoring case and blanks."""
    label_of = {normalized(name): label for label, name in theirs.names.items()}
    pairs = [(label, label_of.get(normalized(name))) for label, name in ours.names.items()]
    return [(label, their_label) for label, their_label in pairs if their_label is not None]


def describe_classes(classes: Classes, rows: Iterable[tuple[int, int]]) -> str:
    """Describe which classes the class head knows from the checkpoint (`rows`), and which are new."""
    kept = {label for label, _ in rows}
    known = [name for label, name in classes.names.items() if label in kept]
    new = [name for label, name in classes.names.items() if label not in kept]
    groups = (("class known by name", "classes known by name", known), ("new class", "new classes", new))
    return ", ".join(f"{counted(len(names), one, many)} ({shortened(names)})" for one, many, names in groups if names)


def describe_misfits(names: list[str], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Describe the first few tensors with their shapes in the model and in the checkpoint."""
    shapes = ((name, shape_text(ours.get(name)), shape_text(theirs.get(name))) for name in names)
    return shortened([f"{name} is {here} in the model, {there} in the checkpoint" for name, here, there in shapes], 3)


def shortened(texts: list[str], most: int = 8) -> str:
    return ", ".join(texts[:most]) + (", .." if len(texts) > most else "")
