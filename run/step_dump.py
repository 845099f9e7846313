"""Dump of a training step that was not finite, which `run.step_guard` writes and `scripts.replay` repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.checkpoint import num_classes_of
from checkpoints.checkpoint_schema import COUNT, FLOATS, INTEGERS, flags, weights
from checkpoints.schema import Check, integer, list_of, record, table_of, tensor, text
from checkpoints.torch_file import load_file
from util.errors import InputError
from util.text import counted

TARGET = record(
    {"boxes": tensor(*FLOATS, dims=2), "labels": tensor(torch.int64, dims=1), "image_id": tensor(*INTEGERS)},
    {"masks": tensor(torch.uint8, dims=3)},
)
RANDOM_STATE = tensor(torch.uint8, dims=1)


def batch(value: Any, place: str) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Return a batch after checks: images [B, 3, H, W], their padding mask [B, H, W] and B targets."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise InputError(f"{place} is not a batch of images, masks and targets")
    images = tensor(*FLOATS, torch.uint8, dims=4)(value[0], f"{place}[0]")
    mask = tensor(torch.bool, dims=3)(value[1], f"{place}[1]")
    targets = list_of(TARGET, len(images), len(images))(value[2], f"{place}[2]")
    if images.shape[1] != 3 or images.shape[0::2] + images.shape[3:] != mask.shape or 0 in images.shape:
        raise InputError(f"{place}: images {list(images.shape)} and masks {list(mask.shape)} do not belong together")
    for target in targets:
        objects = len(target["labels"])
        if target["boxes"].shape != (objects, 4) or target["image_id"].numel() != 1:
            raise InputError(f"{place}: a target's boxes, labels and image_id do not belong together")
        if "masks" in target and len(target["masks"]) != objects:
            raise InputError(
                f"{place}: a target has {counted(objects, 'box')} and {counted(len(target['masks']), 'mask')}"
            )
    return images, mask, targets


DUMP: Check = record(
    {
        "place": record({"epoch": COUNT, "step": COUNT, "process": COUNT}),
        "model": weights,
        "args": flags,
        "batches": list_of(batch, 1, 10**6),
        "num_boxes": tensor(*FLOATS, dims=0),
        "processes": integer(1, 10**6),
        "scale": tensor(*FLOATS, dims=0),
        "threads": integer(1, 1024),
        "random": record({"cpu": RANDOM_STATE}, {"cuda": RANDOM_STATE}),
        "losses": table_of(text, tensor(*FLOATS, dims=0), most=10_000),
    }
)


def load_dump(source: str) -> dict[str, Any]:
    """Return the contents of a dump, on the CPU. Raise InputError if the file was not written by a run."""
    contents = load_file(Path(source), source)
    if not isinstance(contents, dict) or not {"batches", "place"} <= contents.keys():
        raise InputError(f"{source}: not the dump of a step")
    dump = DUMP(contents, f"{source}:")
    num_classes = num_classes_of(dump, source)
    for _, _, targets in dump["batches"]:
        for labels in (target["labels"] for target in targets):
            if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                raise InputError(f"{source}: a target's label is not one of the model's {num_classes} class ids")
    text(dump["args"].get("device"), f"{source}: args.device")
    return dump
