"""The smallest and largest value of every numeric flag, in one table, and the check of paths and devices.

It imports nothing that takes long, so that a mistake on the command line is reported at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from util.errors import InputError

COUNT = 1_000_000  # more epochs, steps or batches than anybody trains
WEIGHT = 1_000_000  # of a loss or a cost; far larger ones would only overflow

LIMITS: dict[str, tuple[float, float]] = {
    "lr": (0, 1000),
    "lr_backbone": (0, 1000),
    "weight_decay": (0, 1000),
    "clip_max_norm": (0, WEIGHT),
    "batch_size": (1, 65_536),
    "accum_steps": (1, COUNT),
    "epochs": (1, COUNT),
    "lr_drop": (1, COUNT),
    "start_epoch": (0, COUNT),
    "eval_every": (1, COUNT),
    "save_every": (0, 10**12),
    "skip_nonfinite": (0, 10**12),
    "overfit": (0, COUNT),
    "enc_layers": (0, 100),
    "dec_layers": (1, 100),
    "hidden_dim": (4, 4096),
    "dim_feedforward": (1, 32_768),
    "nheads": (1, 1024),
    "num_queries": (1, 10_000),
    "max_detections": (1, 10_000),
    "num_classes": (1, 100_000),
    "dropout": (0, 1),
    "focal_alpha": (0, 1),
    "set_cost_class": (0, WEIGHT),
    "set_cost_bbox": (0, WEIGHT),
    "set_cost_giou": (0, WEIGHT),
    "cls_loss_coef": (0, WEIGHT),
    "bbox_loss_coef": (0, WEIGHT),
    "giou_loss_coef": (0, WEIGHT),
    "mask_loss_coef": (0, WEIGHT),
    "dice_loss_coef": (0, WEIGHT),
    "max_megapixels": (1, 10_000),
    "min_size": (1, 16_384),
    "max_size": (1, 65_536),
    "num_workers": (0, 1024),
    "seed": (0, 4_000_000_000),  # NumPy takes 32 bits, of which some are for the rank
    "world_size": (1, COUNT),
    "local_rank": (0, COUNT),
}


def check_numbers(args: argparse.Namespace, where: str = "") -> None:
    """Raise InputError for a number outside its limits; `where` leads the message, such as a checkpoint's name."""
    for flag, (least, most) in LIMITS.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}--{flag} {short(value)}: must be a number")
        if problem := outside(value, least, most):
            raise InputError(f"{where}--{flag} {short(value)}: {problem}")


def outside(value: float, least: float, most: float) -> str:
    """Return what is wrong with a number that must lie between two others (inclusive); "" if nothing is."""
    if value != value:
        return f"must be a number between {least:,} and {most:,}"
    if value < least:
        return f"must be at least {least:,}"
    return f"must be at most {most:,}" if value > most else ""


def number(least: float, most: float, kind: type = int) -> Callable[[str], float]:
    """Return a `type` for an argparse flag that takes numbers between two others (inclusive)."""

    def parse(text: str) -> float:
        if problem := outside(value := kind(text), least, most):
            raise argparse.ArgumentTypeError(f"{short(text)}: {problem}")
        return value

    parse.__name__ = kind.__name__  # argparse names it for texts that are no numbers: "invalid int value"
    return parse


def short(value: object) -> str:
    """Return a value as the part of a line, at most 40 characters long."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else f"{str(value)[:10]}.."
    return text if len(text) <= 40 else f"{text[:38]}.."


def check_paths(args: argparse.Namespace) -> None:
    """Raise InputError for a text with a NUL byte, which no path, name or address can contain."""
    for flag, value in vars(args).items():
        if isinstance(value, str) and "\0" in value:
            raise InputError(f"--{flag} {value!r}: contains a NUL byte")


def check_device(name: str) -> None:
    """Raise InputError for a device other than cpu, cuda and cuda:N, or one that this machine does not have."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise InputError(f"--device {short(name)}: not a device that is supported; cuda, cuda:N or cpu")
    if name == "cpu":
        return
    import torch  # takes seconds

    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here; pass --device cpu")
    count = torch.cuda.device_count()
    if ":" in name and int(name.split(":")[1]) >= count:
        raise InputError(f"--device {name}: torch sees only {count} GPU{'s' * (count != 1)}, counted from 0")


def default_device(text: str) -> str:
    """Return a device's name; of "auto", cuda if torch sees a GPU, else cpu."""
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
