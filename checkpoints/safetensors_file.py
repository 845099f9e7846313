"""Checkpoints as safetensors files, with flags and classes as JSON in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.schema import from_json
from util.command import need
from util.errors import InputError, reason
from util.files import check_is_file, replacing

DESCRIPTIONS = ("args", "class_ids", "class_names", "class_isthing")  # entries of a checkpoint about its model


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return a file's contents as a checkpoint, with the flags and classes that `write_safetensors` adds.

    Raise InputError if it is damaged.
    """
    weights, metadata = read_tensors(path)
    described = {
        name: from_json(metadata[name], f"{path}: its metadata was not written by scripts.convert: {name}")
        for name in DESCRIPTIONS
        if name in metadata
    }
    return {"model": weights} | described


def write_safetensors(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint's weights, flags and classes atomically, without the state of the training."""
    metadata = {name: json.dumps(checkpoint[name]) for name in DESCRIPTIONS if name in checkpoint}
    write_tensors(path, checkpoint["model"], metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file on the CPU, and its metadata."""
    safetensors = need("safetensors", "safetensors", f"{path}: a safetensors file")
    check_is_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file, or a damaged one ({reason(error)})") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raise InputError if it cannot be written."""
    safetensors = need("safetensors.torch", "safetensors", f"{path}: a safetensors file")
    contents = safetensors.save(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"} | metadata
    )
    with replacing(path) as file:
        file.write(contents)
