"""Structure of files with models and states of training, declared once for all formats.

Data that is not declared here is not read.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from checkpoints.schema import (
    Check,
    boolean,
    either,
    integer,
    integers,
    items,
    label,
    list_of,
    one_of,
    real,
    record,
    table_of,
    tensor,
    text,
    wrong,
)
from checkpoints.weight_flags import model_of, of_detector, sizes_of
from flags.limits import check_numbers
from flags.parser import MODELS
from util.errors import InputError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
MOST_REPEATED = 4  # limit of the weights' size / stored size: a file stores weights with several names once

# Numeric flags on which a model, its data, training or a replayed step depend; their limits are in `flags.limits`.
NUMBERS = (
    *("lr", "lr_backbone", "batch_size", "weight_decay", "epochs", "lr_drop", "clip_max_norm", "accum_steps", "seed"),
    "ema_decay",
    *("enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "dropout", "nheads", "num_queries", "num_classes"),
    "group_detr",
    *("set_cost_class", "set_cost_bbox", "set_cost_giou", "cls_loss_coef", "bbox_loss_coef", "giou_loss_coef"),
    *("focal_alpha", "eos_coef", "min_size", "max_size", "max_detections", "max_megapixels", "overfit"),
)
SWITCHES = (
    *("dilation", "aux_loss", "pre_norm", "masks", "checkpoint_activations", "compile", "deterministic"),
    "remove_difficult",
)
TEXTS = (
    *("backbone", "position_embedding", "dataset_file", "coco_path"),
    *("train_images", "train_annotations", "val_images", "val_annotations", "on_bad_image"),
)
CHOICES = {
    "model": MODELS,
    "backbone_norm": ("frozen", "batch"),
    "amp": ("none", "bf16", "fp16"),
    "lr_schedule": ("step", "linear"),
    "lr_scale": ("none", "sqrt", "linear"),
}


def number_flag(name: str) -> Check:
    """Return the check of a flag's number against its limits."""

    def check(value: Any, place: str) -> float:
        number = real()(value, place)
        check_numbers(argparse.Namespace(**{name: number}), f"{place.rpartition(': ')[0]}: ")
        return number

    return check


KNOWN_FLAGS = {
    **{name: number_flag(name) for name in NUMBERS},
    **dict.fromkeys(SWITCHES, boolean),
    **dict.fromkeys(TEXTS, text),
    **{name: one_of(*choices) for name, choices in CHOICES.items()},
}


def flags(value: Any, place: str) -> dict[str, Any]:
    """Return the flags of a run: `KNOWN_FLAGS` are checked; of other flags, only numbers, texts and bools are kept."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, dict):
        raise wrong(value, place, "a dict or an argparse.Namespace")
    checked = {}
    for name, flag in value.items():
        if isinstance(flag, torch.device | torch.dtype):
            flag = str(flag)
        if name in KNOWN_FLAGS and flag is not None:  # None stands for the default
            checked[name] = KNOWN_FLAGS[name](flag, f"{place}.{name}")
        elif isinstance(name, str) and name.isidentifier() and isinstance(flag, bool | int | float | str):
            checked[name] = flag
    return checked


def weights(value: Any, place: str) -> dict[str, Tensor]:
    """Return a state dict: tensors by name, which need not much more memory than the data in their file."""
    checked = table_of(text, tensor(*FLOATS, *INTEGERS), most=100_000)(value, place)
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in checked.values()}
    claimed = sum(t.numel() * t.element_size() for t in checked.values())
    if claimed > MOST_REPEATED * sum(stored.values()):
        raise InputError(f"{place} claims {claimed:,} bytes of weights, but the file holds {sum(stored.values()):,}")
    return checked


def scalar_tensor(value: Any, place: str) -> Tensor:
    """Return the optimizer's number of steps for a weight as a tensor; early versions of torch store an integer."""
    number = value.item() if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1 else value
    return torch.tensor(float(real(0, 1e12)(number, place)))


COUNT = integer(0, 10**12)
MOMENTS = tensor(*FLOATS)
OPTIMIZER = record(
    {
        "state": table_of(
            label, record({"step": scalar_tensor, "exp_avg": MOMENTS, "exp_avg_sq": MOMENTS}), most=100_000
        ),
        "param_groups": list_of(record({"params": integers(None, 10**6)}), most=100),
    }
)
BYTES = integers(None, 255)
RANDOM = record(
    {
        "torch": record({"cpu": BYTES}, {"cuda": BYTES}),
        # NumPy does not check the position in the state, and would read beyond its end.
        "numpy": items(one_of("MT19937"), integers(624, 2**32 - 1), integer(0, 624), integer(0, 1), real()),
        "python": items(one_of(3), integers(625, 2**32 - 1), either(one_of(None), real())),
    }
)
METERS = table_of(text, record({"window": list_of(real(), most=1000), "total": real(), "count": COUNT}), most=10_000)
SCALER_FACTORS = {"scale": real(1e-30, 1e30), "growth_factor": real(1, 1e6), "backoff_factor": real(1e-6, 1)}
SCALER = either(one_of({}), record(SCALER_FACTORS | {"growth_interval": integer(1), "_growth_tracker": COUNT}))
MODEL = {
    "args": flags,
    "class_names": table_of(label, text, most=100_000),
    "class_ids": table_of(label, either(text, integer(-(2**63))), most=100_000),
    "class_isthing": table_of(label, integer(0, 1), most=100_000),
    "epoch": integer(-1, 10**6 - 1),
    "ap": real(),
}
TRAINING = {
    "optimizer": OPTIMIZER,
    "step": COUNT,
    "skipped": COUNT,
    "scaler": SCALER,
    "processes": list_of(record({"random": RANDOM, "meters": METERS}), 1, 10_000),
    "ema": record({"model": weights, "steps": COUNT}),  # averaged weights
    "train_stats": table_of(text, real(), most=10_000),
}
# Keys that need others.
NEEDS = {"train_stats": ("epoch",), "processes": ("epoch", "step", "skipped", "scaler", "optimizer")}


def check_checkpoint(contents: Any, source: object, training: bool) -> dict[str, Any]:
    """Return the checked checkpoint in a file's contents: `model`, `args` (empty if missing), and optional keys.

    Args:
        contents: plain data and tensors of any structure.
        source: the name of the file in messages.
        training: also keep the state of the training.

    Raises:
        InputError: if a required value is missing, or a value is not of the expected kind.
    """
    if isinstance(contents, dict) and "processes" not in contents:  # averages of other code cannot be continued
        contents = {key: value for key, value in contents.items() if key != "ema"}
    structure = record({"model": weights}, MODEL | TRAINING if training else MODEL)
    checkpoint = {"args": {}} | structure(contents, f"{source}:")
    for name, needed in NEEDS.items():
        if name in checkpoint and (missing := [other for other in needed if other not in checkpoint]):
            raise InputError(f"{source}: holds {name}, but not {missing[0]}")
    if "processes" in checkpoint and not {"batch_size", "accum_steps"} <= checkpoint["args"].keys():
        raise InputError(f"{source}: its args lack --batch_size or --accum_steps, which resuming needs")
    _check_sizes(checkpoint["args"], checkpoint["model"], source)
    _check_classes(checkpoint, source)
    return checkpoint


def _check_sizes(args: dict[str, Any], weights: dict[str, Tensor], source: object) -> None:
    """Raise InputError if flags and weights contradict each other, before a model of any size is built."""
    for flag, size in sizes_of(weights).items():
        if args.get(flag, size) != size:
            raise InputError(f"{source} does not fit the model: its args say --{flag} {args[flag]}, its weights {size}")


def _check_classes(checkpoint: dict[str, Any], source: object) -> None:
    """Raise InputError if class names do not fit the model's logits."""
    names, ids = checkpoint.get("class_names"), checkpoint.get("class_ids")
    if names and ids and names.keys() != ids.keys():
        raise InputError(f"{source}: class_names and class_ids have different labels")
    head = of_detector(checkpoint["model"]).get("class_embed.bias")
    if head is None:
        return
    last = head.numel() - 1 - (model_of(checkpoint["model"]) == "detr")  # DETR's last logit is "no object"
    for labels in filter(None, (names, ids)):
        if max(labels) > last:
            raise InputError(f"{source}: names class {max(labels)}, but its model has classes 0 to {last}")
