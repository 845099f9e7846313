"""Writing, finding and reading checkpoints.

Nothing is unpickled but tensors, plain containers and the `argparse.Namespace` of published checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from util.classes import Classes
from util.distributed import barrier, is_first_of_node, is_main_process
from util.errors import InputError, reason
from util.files import check_is_file, download, replacing
from util.flag_limits import check_model, check_numbers

# The flags that decide what a model computes; a checkpoint is of use only to a model with the same.
MODEL_FLAGS = (
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
)
IMAGE_SIZES = ("min_size", "max_size")
# Those that decide how it trains on: they may change, but rarely by intent.
TRAINING_FLAGS = (
    "lr",
    "lr_backbone",
    "lr_scale",
    "lr_drop",
    "weight_decay",
    "batch_size",
    "accum_steps",
    "clip_max_norm",
    "dropout",
    "focal_alpha",
    "min_size",
    "max_size",
    "seed",
)
PUBLISHED = {
    f"conditional_detr_{model}": "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/"
    f"ConditionalDETR_{name}_epoch50.pth"
    for model, name in {
        "resnet50": "r50",
        "resnet50_dc5": "r50dc5",
        "resnet101": "r101",
        "resnet101_dc5": "r101dc5",
    }.items()
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def save_on_master(obj: Any, path: str | Path, keep_old_as: Path | None = None) -> None:
    """`torch.save` on the main process, by way of a temporary file; see `replacing`."""
    if is_main_process():
        with replacing(Path(path), keep_old_as) as file:
            torch.save(obj, file)


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint on the CPU, its `args` as a plain dict.

    Args:
        source: a file, a URL, the name of a hub entry (`PUBLISHED`), a safetensors file, or a folder of Hugging Face
            transformers.

    Raises:
        InputError: where it is missing, unreadable, carries more than tensors and plain data, or holds no model.
    """
    path = _local_path(PUBLISHED.get(str(source), str(source)))
    if path.is_dir():
        from util.huggingface import read_folder  # these import what the hub entries do without

        return read_folder(path)
    if path.suffix == ".safetensors":
        from util.safetensors_file import read_safetensors

        return read_safetensors(path)
    checkpoint = load_file(path, source)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{source}: holds no 'model'")
    args = checkpoint.get("args") or {}
    checkpoint["args"] = vars(args) if isinstance(args, argparse.Namespace) else args
    return checkpoint


def load_file(path: Path, source: str | Path) -> Any:
    """What `torch.save` wrote: tensors and plain data, no code. `source` names it in errors, which are InputErrors."""
    check_is_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        if re.search(r"GLOBAL|Can only (build|create)", str(error)):
            raise InputError(f"{source}: refused, it carries code or objects beyond tensors and plain data") from error
        raise InputError(f"{source}: not a checkpoint, or a damaged one") from error
    except Exception as error:  # a truncated file makes torch.load raise many types
        raise InputError(f"{source}: not a checkpoint, or a damaged one ({reason(error).split('. ')[0]})") from error


def load_latest_checkpoint(
    output_dir: str | Path, report: Callable[[str], None] = print
) -> tuple[dict[str, Any], Path] | None:
    """The furthest checkpoint that a run left in its folder, and its path; None where there is none.

    One that cannot be read is named through `report` and passed over.

    Raises:
        InputError: where there are some, but none can be read.
    """
    folder = Path(output_dir)
    numbered = {int(m[1]): p for p in folder.glob("checkpoint*.pth") if (m := re.fullmatch(r"checkpoint(\d+)", p.stem))}

    def try_to_load(path: Path) -> tuple[dict[str, Any], Path] | None:
        try:
            return load_checkpoint(path), path
        except InputError as error:
            report(f"{error}; looking for one before it")
            return None

    written = [path for name in ("checkpoint", "checkpoint_previous") if (path := folder / f"{name}.pth").exists()]
    latest = next(filter(None, map(try_to_load, written)), None)
    for epoch in sorted(numbered, reverse=True):
        if latest and latest[0].get("epoch", -1) >= epoch:
            break
        latest = try_to_load(numbered[epoch]) or latest
    if (written or numbered) and not latest:
        raise InputError(f"{folder}: none of its checkpoints can be read; move them elsewhere to start anew")
    return latest


def num_classes_of(checkpoint: dict[str, Any], source: str | Path) -> int:
    """The number of logits of a checkpoint's class head.

    Raises InputError where it has none.
    """
    try:
        return len(checkpoint["model"]["class_embed.bias"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{source}: not a Conditional DETR, it has no class head (class_embed.bias)") from error


def classes_of(checkpoint: dict[str, Any], source: str | Path) -> Classes:
    """Return the classes that a checkpoint's model tells apart."""
    return replace(Classes.from_checkpoint(checkpoint, num_classes_of(checkpoint, source)), source=str(source))


def changed_flags(args: argparse.Namespace, checkpoint: dict[str, Any], flags: Iterable[str]) -> list[str]:
    """Describe every flag whose value differs from the checkpoint's, with both values.

    Flags that a checkpoint does not know are left out.
    """
    stored = stored_flags(checkpoint)
    return [
        f"--{flag} is {getattr(args, flag)} now, {stored[flag]} in the checkpoint"
        for flag in flags
        if flag in stored and getattr(args, flag) != stored[flag]
    ]


def stored_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that a checkpoint was made with; published ones, which do not say so, have frozen norms."""
    return checkpoint["args"] and {"backbone_norm": "frozen"} | checkpoint["args"]


def check_stored_flags(args: argparse.Namespace, source: str | Path) -> None:
    """Raise InputError if flags that come from a checkpoint make no model, or sizes of images that fit no memory."""
    check_numbers(args, f"{source}: ", (*MODEL_FLAGS, *IMAGE_SIZES))
    check_model(args, f"{source}: ")


def check_finite(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raise InputError if a weight is infinite or NaN, as a diverged training of other code leaves it."""
    for key, tensor in weights.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{source}: weights are not finite, the first in {key}; use an earlier checkpoint")


def load_model_weights(model: nn.Module, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Fills a model with a checkpoint's weights; every key has to fit.

    Raises InputError with the first of the keys that do not.
    """
    weights = checkpoint["model"]
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: getattr(tensor, "shape", None) for key, tensor in weights.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        here, there = (list(s[key]) if key in s else "nothing" for s in (expected, found))
        raise InputError(
            f"{source} does not fit the model: {key} is {here} here and {there} there ({len(wrong)} keys differ)"
        )
    model.load_state_dict(weights)


def _local_path(source: str) -> Path:
    """Where a file is, or where the file of a URL is kept: downloaded once a machine, into torch.hub's folder."""
    url = urlsplit(source)
    if "://" not in source:
        return Path(source)
    if url.scheme == "file":
        return Path(url2pathname(url.path))
    if url.scheme != "https" and not (url.scheme == "http" and url.hostname in LOOPBACK):
        raise InputError(f"{source}: not loaded over {url.scheme}; use https or a file")
    key = hashlib.sha256(source.encode()).hexdigest()[:8]  # many checkpoints share the name checkpoint.pth
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{Path(url.path).name}"
    if is_first_of_node() and not path.exists():
        try:
            download(source, path, progress=is_main_process())
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{source}: could not be downloaded ({error}); place the file at {path} or name another by its path"
            ) from error
    barrier()
    return path
