"""Limits of all numeric flags, in one table for main.py and all tools, and checks of paths, models and devices.

This module imports nothing slow, so that mistakes on the command line are reported at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import InputError, reason
from util.text import counted

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
MOST_WEIGHTS = 1e9  # of a transformer; training this many takes 16 GB


class Number(NamedTuple):
    """Limits of a flag: it accepts values of type `kind` from `least` to `most`, and 0 if `zero` is True.

    No flag accepts NaN or infinity. `why` explains the limits in messages.
    """

    kind: type
    least: float
    most: float
    why: str = ""
    zero: bool = False


EPOCHS = 10**6, "file names count epochs in six digits"
COUNT = 10**9, "no run counts this far"
MEMORY = "larger values do not fit into memory"
RATE = Number(float, 1e-12, 1, "AdamW changes each weight by about this much per step", zero=True)
# float32 has seven digits: a much smaller term is lost in a sum, and tiny gradients are lost next to AdamW's eps, 1e-8.
COEFFICIENT = Number(float, 1e-6, 1e6, "smaller ones have no effect, larger ones overflow", zero=True)
SHARE = Number(float, 0, 1)

LIMITS: dict[str, Number] = {
    "lr": RATE,
    "lr_backbone": RATE,
    "batch_size": Number(int, 1, 2**16, MEMORY),
    "weight_decay": Number(float, 0, 100),
    "epochs": Number(int, 1, *EPOCHS),
    "lr_drop": Number(int, 1, *COUNT),
    "clip_max_norm": Number(float, 1e-6, 1e6, "smaller gradients change no weight; 0 turns clipping off", zero=True),
    "accum_steps": Number(int, 1, 10**6, "no run needs more"),
    "ema_decay": Number(float, 0, 0.999999, "1 would keep the initial weights"),
    "enc_layers": Number(int, 0, 100, MEMORY),
    "dec_layers": Number(int, 1, 100, MEMORY),
    "dim_feedforward": Number(int, 1, 2**16, MEMORY),
    "hidden_dim": Number(int, 4, 2**12, MEMORY),
    "dropout": SHARE,
    "nheads": Number(int, 1, 2**12),
    "num_queries": Number(int, 1, 10_000, MEMORY),
    "group_detr": Number(int, 1, 100, MEMORY),
    "num_classes": Number(int, 1, 100_000, MEMORY),
    "set_cost_class": COEFFICIENT,
    "set_cost_bbox": COEFFICIENT,
    "set_cost_giou": COEFFICIENT,
    "mask_loss_coef": COEFFICIENT,
    "dice_loss_coef": COEFFICIENT,
    "cls_loss_coef": COEFFICIENT,
    "bbox_loss_coef": COEFFICIENT,
    "giou_loss_coef": COEFFICIENT,
    "eos_coef": COEFFICIENT,
    "focal_alpha": Number(float, 0.001, 0.999, "otherwise the class loss ignores the objects or the background"),
    "max_detections": Number(int, 1, 10_000, "no image has this many objects"),
    "max_megapixels": Number(int, 1, 10_000, MEMORY),
    "min_size": Number(int, 16, 10_000, "one feature covers 32 pixels, and larger images do not fit into memory"),
    "max_size": Number(int, 1, 20_000, MEMORY),
    "seed": Number(int, 0, 4 * 10**9, "seed + rank must fit into the 32 bits of NumPy's seeds"),
    "overfit": Number(int, 0, *COUNT),
    "start_epoch": Number(int, 0, *EPOCHS),
    "save_every": Number(int, 0, *COUNT),
    "skip_nonfinite": Number(int, 0, *COUNT),
    "eval_every": Number(int, 1, *COUNT),
    "patience": Number(int, 0, *COUNT),
    "num_workers": Number(int, 0, 512, "each worker is a process or thread"),
    "world_size": Number(int, 1, 10**6),
    "local_rank": Number(int, 0, 10**6),
    # flags of the tools in scripts/
    "threshold": SHARE,
    "panoptic_threshold": SHARE,
    "every": Number(int, 1, *COUNT),
    "top": Number(int, 1, 100, "the page has a block for each"),
    "queries": Number(int, 0, 9_999),
    "layer": Number(int, -100, 99),
    "size": Number(int, 32, 10_000, MEMORY),
    "batch_sizes": Number(int, 1, 2**16, MEMORY),
    "images": Number(int, 1, 2**16, MEMORY),
    "repeats": Number(int, 1, 10**6, "no measurement needs more"),
    "train": Number(int, 1, 10**6, "file names count images in six digits"),
    "val": Number(int, 1, 10**6, "file names count images in six digits"),
}


def check_numbers(args: argparse.Namespace, where: str = "", flags: Iterable[str] = LIMITS) -> None:
    """Raise InputError if a number is not valid for its flag; the message begins with `where`, such as a file name.

    Flags that are None or absent are skipped; in lists, each number is checked.
    """
    for flag in filter(LIMITS.get, flags):
        value = getattr(args, flag, None)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and (problem := wrong_with(number, LIMITS[flag])):
                raise InputError(f"{where}--{flag} {short(number)}: {problem}")


def wrong_with(value: Any, limits: Number) -> str:
    """Return the reason why a number is not valid, or "" if it is."""
    kind, least, most, why, zero = limits
    is_of_kind = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_of_kind:
        return f"must be {'an integer' if kind is int else 'a number'}"
    if value != value or value in (math.inf, -math.inf):
        return "must be a finite number"
    if least <= value <= most or (zero and value == 0):
        return ""
    if zero and 0 < value < least:
        problem = f"must be 0 or at least {least:,.12g}"
    elif value < least:
        problem = f"must be at least {0 if zero else least:,.12g}"
    else:
        problem = f"must be between {0 if zero else least:,.12g} and {most:,.12g}"
    return f"{problem} ({why})" if why and value > 0 else problem


def check_sizes(args: argparse.Namespace) -> None:
    """Raise InputError if the limit for the long side of images is below the short side."""
    if args.max_size < args.min_size:
        raise InputError(f"--max_size {args.max_size}: must be at least --min_size {args.min_size}")


def check_texts(values: Mapping[str, Any]) -> None:
    """Raise InputError for a text that cannot be a path: it has a NUL, is too long, or its folder denies access.

    `values` maps flag names, as messages print them, to values. All texts are checked, because flags that accept URLs
    or names also accept paths.
    """
    for flag, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path):
                try:
                    Path(text).stat()
                except (FileNotFoundError, NotADirectoryError):
                    continue  # it may be an output; reading a missing file raises a better error later
                except (OSError, ValueError) as error:
                    cause = getattr(error, "strerror", None) or reason(error)
                    raise InputError(f"{flag} {short(text)}: cannot be a path ({cause})") from error


def check_model(args: argparse.Namespace, where: str = "") -> None:
    """Raise InputError for flags that describe no valid model; the message begins with `where`, such as a file name."""
    if getattr(args, "pre_norm", False):
        raise InputError(
            f"{where}--pre_norm: Conditional DETR's decoder has its norms after the residual sums; drop the flag"
        )
    if args.backbone not in BACKBONES:
        raise InputError(f"{where}--backbone {short(args.backbone)}: choose one of {', '.join(BACKBONES)}")
    if args.group_detr > 1 and args.model != "conditional_detr":
        raise InputError(
            f"{where}--group_detr {args.group_detr}: only conditional_detr trains groups of queries; drop the flag"
        )
    if args.dropout == 1:
        raise InputError(f"{where}--dropout 1: every activation would be dropped; pass less than 1")
    if args.set_cost_class == args.set_cost_bbox == args.set_cost_giou == 0:
        raise InputError(f"{where}--set_cost_class, --set_cost_bbox and --set_cost_giou cannot all be 0")
    check_model_size(args, where)


def check_model_size(args: argparse.Namespace, where: str = "") -> None:
    """Raise InputError if the heads do not divide the width, or there are more than `MOST_WEIGHTS` weights."""
    dim, heads = args.hidden_dim, args.nheads
    if dim < 4 or dim % 4 or heads < 1 or dim % heads:
        raise InputError(f"{where}--hidden_dim {dim} must be a multiple of 4 and of --nheads {heads}")
    attention = (4 * args.enc_layers + 13 * args.dec_layers) * dim**2
    feed_forward = 2 * (args.enc_layers + args.dec_layers) * dim * args.dim_feedforward
    if (weights := attention + feed_forward) > MOST_WEIGHTS:
        raise InputError(
            f"{where}--hidden_dim, --dim_feedforward, --enc_layers and --dec_layers make a transformer of "
            f"{weights / 1e9:.1f} billion weights; at most {MOST_WEIGHTS / 1e9:g} billion are supported"
        )


def check_device_name(name: str) -> None:
    """Raise InputError for a device other than cpu, cuda and cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise InputError(f"--device {short(name)}: not a supported device; pass cuda, cuda:N or cpu")


def check_device(name: str) -> None:
    """Raise InputError for a device that is not supported, or that this machine does not have."""
    import torch  # takes seconds, so everything else is checked first

    check_device_name(name)
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here; pass --device cpu")
    if int(name.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"--device {name}: torch sees {counted(count, 'GPU')}, counted from 0; pass a lower N")


def resolve_device(text: str) -> str:
    """Return the name of a device; for "auto", cuda if torch sees a GPU, else cpu."""
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def short(value: object) -> str:
    """Return a value as text for a message, at most 40 characters long."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print very long integers
        return f"{'-' if value < 0 else ''}1e{int(math.log10(abs(value)))}"
    text = str(value) if str(value).isprintable() else ascii(str(value))
    return text if len(text) <= 40 else f"{text[:38]}.."
