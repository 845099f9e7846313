"""Resolved flags: complete and read-only."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from flags.parser import DEFAULTS, get_args_parser
from util.errors import InputError

NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}  # per --dataset_file, as published; COCO's highest ids are 90 and 200

# The flags that decide what a model computes; a checkpoint fits only a model with the same values.
MODEL_FLAGS = (
    "model",
    "backbone",
    "dilation",
    "backbone_norm",
    "position_embedding",
    "hidden_dim",
    "nheads",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "num_queries",
    "group_detr",
    "masks",
)
IMAGE_SIZES = ("min_size", "max_size")
# The flags that decide how training continues: a resumed run may change them, but this is rarely intended.
TRAINING_FLAGS = (
    "lr",
    "lr_backbone",
    "lr_scale",
    "lr_schedule",
    "lr_drop",
    "weight_decay",
    "batch_size",
    "accum_steps",
    "ema_decay",
    "clip_max_norm",
    "dropout",
    "focal_alpha",
    *IMAGE_SIZES,
    "seed",
)
RESOLVED = "resolved"  # the name of an attribute that is True in resolved flags
OF_ONE_PROCESS = ("rank", "gpu", "distributed", "local_rank")  # not stored in checkpoints


class Flags(argparse.Namespace):
    """Resolved flags, which are read-only; `resolve` returns a copy with other values.

    Attributes:
        given: the names of the flags that were set on purpose.
    """

    __slots__ = ("given",)  # not in `vars`, which checkpoints store

    def __init__(self, values: dict[str, Any], given: Iterable[str]) -> None:
        vars(self).update(values)
        object.__setattr__(self, "given", frozenset(given))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"flags.{name} cannot be set to {value!r}: flags are read-only once they are resolved")


def resolve(args: argparse.Namespace, **values: Any) -> Flags:
    """Return complete, read-only flags: flags that `args` lacks get their defaults.

    `args` may come from the published code or an older version, which have fewer flags. Flags that are not given and
    whose defaults depend on the model get the defaults of `args.model`.

    Args:
        args: flags of `get_args_parser` or of a checkpoint, or resolved flags.
        values: flags that replace those of `args`, but do not count as given.

    Raises:
        InputError: for a model that is not known.
    """
    given = given_flags(args)
    default = defaults()
    flags = default | vars(args) | values
    if flags["model"] not in DEFAULTS:
        raise InputError(f"--model {flags['model']}: choose one of {', '.join(DEFAULTS)}")
    if not getattr(args, RESOLVED, False) or flags["model"] != args.model:
        of_model = {name: default[name] for names in DEFAULTS.values() for name in names} | DEFAULTS[flags["model"]]
        flags |= {name: value for name, value in of_model.items() if name not in given and name not in values}
    return Flags(flags | {RESOLVED: True}, given)


def defaults() -> dict[str, Any]:
    """Return the default of each flag."""
    return vars(get_args_parser().parse_args([]))


def given_flags(args: argparse.Namespace) -> frozenset[str]:
    """Return the names of the flags that were set on purpose.

    A flag that the command line sets counts, even if it is set to its default. In a namespace from Python code, only
    flags with other values than the default count.
    """
    if isinstance(args, Flags):
        return args.given
    default = vars(get_args_parser().parse_args([], argparse.Namespace(device="")))  # "auto" would import torch
    changed = {name for name, value in vars(args).items() if name not in default or value != default[name]}
    return getattr(args, "given", frozenset()) | changed


def stored(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as a checkpoint stores them."""
    return {name: value for name, value in vars(flags).items() if name not in OF_ONE_PROCESS}
