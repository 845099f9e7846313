"""Reading of checkpoints, and checks that they fit a model."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from checkpoints.checkpoint_schema import check_checkpoint
from checkpoints.downloads import local_path
from checkpoints.published import PUBLISHED, known_flags
from checkpoints.state_dicts import with_plain_weights
from checkpoints.torch_file import load_file
from checkpoints.weight_flags import DETECTOR, QUERIES, flags_of, has_masks, model_of, of_detector
from datasets.classes import Classes
from flags.limits import check_model, check_numbers
from flags.resolve import IMAGE_SIZES, MODEL_FLAGS
from util.errors import InputError
from util.text import counted


def load_checkpoint(source: str | Path, training: bool = False, all_groups: bool = False) -> dict[str, Any]:
    """Return a checkpoint on the CPU, checked against `checkpoints.checkpoint_schema`; `args` is a plain dict.

    If a file has several sets of weights, or keeps them elsewhere than under `model`, a line names the chosen ones.

    Args:
        source: a file, a URL, the name of a hub entry (`PUBLISHED`), a safetensors file, or a folder of Hugging Face
            transformers.
        training: also return the state of the training, and prefer raw to averaged weights.
        all_groups: also return the query groups that Group DETR uses only in training; implied by `training`.

    Raises:
        InputError: if it is missing, cannot be read, contains other objects than tensors and plain data, contains no
            model, or if a value is not of the expected kind.
    """
    path = local_path(PUBLISHED[str(source)].url if str(source) in PUBLISHED else str(source))
    if path.is_dir():
        from checkpoints.huggingface import read_folder  # imports packages that the hub entries do not need

        return check_checkpoint(read_folder(path), source, training)
    if path.suffix == ".safetensors":
        from checkpoints.safetensors_file import read_safetensors

        contents = read_safetensors(path)
    elif not path.exists():
        raise InputError(f"{source}: no such checkpoint{_known_names(str(source))}")
    else:
        contents = load_file(path, source)
    contents, line = with_plain_weights(contents, source, averaged=not training)
    checkpoint = check_checkpoint(contents, source, training)
    if line and "ema" not in checkpoint:  # otherwise, training continues both raw and averaged weights
        from util.logger import log  # needs packages that the hub entries do not need

        log(line)
    checkpoint["args"] = known_flags(str(source), checkpoint["model"]) | checkpoint["args"]
    return checkpoint if training or all_groups else with_first_group(checkpoint, source)


def with_first_group(checkpoint: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Return a checkpoint of Group DETR as one of a plain model, with only its first group of queries.

    Raises:
        InputError: if its queries cannot be divided into the number of groups in its flags.
    """
    name = DETECTOR * has_masks(checkpoint["model"]) + QUERIES
    groups, queries = checkpoint["args"].get("group_detr", 1), checkpoint["model"].get(name)
    if groups == 1 or queries is None:
        return checkpoint
    if queries.dim() != 2 or len(queries) % groups:
        raise InputError(
            f"{source}: its queries, {list(queries.shape)}, cannot be divided into {groups} groups (--group_detr)"
        )
    first = queries[: len(queries) // groups].clone()
    return checkpoint | {
        "model": checkpoint["model"] | {name: first},
        "args": checkpoint["args"] | {"group_detr": 1},
    }


def _known_names(source: str) -> str:
    """Return the end of the error about an unknown name: the names of hub entries; "" for paths."""
    if len(Path(source).parts) > 1 or Path(source).suffix:
        return ""
    close = difflib.get_close_matches(source, PUBLISHED, n=1)
    return f"{f'; did you mean {close[0]}?' * len(close)}; known by name are {', '.join(PUBLISHED)}"


def load_latest_checkpoint(
    output_dir: str | Path, report: Callable[[str], None] = print, training: bool = True
) -> tuple[dict[str, Any], Path] | None:
    """Return the latest checkpoint in the folder of a run, and its path; None if there is none.

    Checkpoints that cannot be read are skipped; `report` is called with a line about each.

    Raises:
        InputError: if there are checkpoints, but none can be read.
    """
    folder = Path(output_dir)
    numbered = {int(m[1]): p for p in folder.glob("checkpoint*.pth") if (m := re.fullmatch(r"checkpoint(\d+)", p.stem))}

    def try_to_load(path: Path) -> tuple[dict[str, Any], Path] | None:
        try:
            return load_checkpoint(path, training), path
        except InputError as error:
            report(f"{error}; trying an earlier one")
            return None

    written = [path for name in ("checkpoint", "checkpoint_previous") if (path := folder / f"{name}.pth").exists()]
    latest = next(filter(None, map(try_to_load, written)), None)
    for epoch in sorted(numbered, reverse=True):
        if latest and latest[0].get("epoch", -1) >= epoch:
            break
        latest = try_to_load(numbered[epoch]) or latest
    if (written or numbered) and not latest:
        raise InputError(f"{folder}: none of its checkpoints can be read; move them elsewhere to start from scratch")
    return latest


def num_classes_of(checkpoint: dict[str, Any], source: str | Path) -> int:
    """Return the number of classes of a checkpoint's model. Raise InputError if it has no class head."""
    head = of_detector(checkpoint["model"]).get("class_embed.bias")
    no_object = model_of(checkpoint["model"]) == "detr"
    if head is None or head.dim() != 1 or len(head) <= no_object:
        raise InputError(
            f"{source}: it has no class head (class_embed.bias); train from its other weights with --finetune"
        )
    return len(head) - no_object


def classes_of(checkpoint: dict[str, Any], source: str | Path) -> Classes:
    """Return the classes of a checkpoint's model."""
    return replace(Classes.from_checkpoint(checkpoint, num_classes_of(checkpoint, source)), source=str(source))


def changed_flags(args: argparse.Namespace, checkpoint: dict[str, Any], flags: Iterable[str]) -> list[str]:
    """Describe every flag whose value differs from the checkpoint's, with both values.

    Flags that the checkpoint does not store are left out.
    """
    stored = stored_flags(checkpoint)
    return [
        f"--{flag} is {getattr(args, flag)} now, {stored[flag]} in the checkpoint"
        for flag in flags
        if flag in stored and getattr(args, flag) != stored[flag]
    ]


def stored_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a checkpoint's run; flags that the published code lacks get the values that describe it."""
    published = {"backbone_norm": "frozen", "model": "conditional_detr", "group_detr": 1, "masks": False}
    return checkpoint["args"] and published | checkpoint["args"]


def check_stored_flags(args: argparse.Namespace, source: str | Path) -> None:
    """Raise InputError if a checkpoint's flags describe no valid model, or images that do not fit into memory."""
    check_numbers(args, f"{source}: ", (*MODEL_FLAGS, *IMAGE_SIZES))
    check_model(args, f"{source}: ")


def check_finite(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raise InputError if a weight is infinite or NaN, for example after training with other code diverged."""
    for key, tensor in weights.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{source}: weights are not finite, the first in {key}; use an earlier checkpoint")


def load_model_weights(model: nn.Module, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Load a checkpoint's weights into a model.

    Raise InputError, which names the first wrong key, if not all keys and shapes are equal.
    """
    ours, theirs = model.state_dict(), checkpoint["model"]
    wrong = sorted(key for key in ours.keys() | theirs.keys() if not fits(ours.get(key), theirs.get(key)))
    if wrong:
        key = wrong[0]
        in_model, in_file = shape_text(ours.get(key)), shape_text(theirs.get(key))
        keys = counted(len(wrong), "key differs", "keys differ")
        raise InputError(
            f"{source} does not fit the model: {key} is {in_model} in the model, {in_file} in the file ({keys})"
            f"{_flags_that_fit(ours, theirs, bool(checkpoint.get('args')))}"
        )
    model.load_state_dict(theirs)


def _flags_that_fit(ours: dict[str, Tensor], theirs: dict[str, Tensor], with_flags: bool) -> str:
    """Return the end of a message: the flags that the weights need, and where to set them."""
    built = flags_of(ours)
    needed = {flag: value for flag, value in flags_of(theirs).items() if built.get(flag) != value}
    if not needed:
        return ""
    texts = " ".join(f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in needed.items())
    if with_flags:
        return f"; its weights need {texts}: correct its args"
    return (
        f"; its weights need {texts}: pass these, --nheads and --dilation to main.py, or store them for all tools "
        'as {"model": weights, "args": {"hidden_dim": 256, ..}}'
    )


def fits(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Return whether a stored weight fits a model's weight: equal shape, and no integers for floats."""
    return (
        ours is not None
        and theirs is not None
        and ours.shape == theirs.shape
        and (theirs.is_floating_point() or not ours.is_floating_point())
    )


def shape_text(weight: Tensor | None) -> str:
    """Describe a weight by its shape, and by its type unless it is a float; None is "missing"."""
    if weight is None:
        return "missing"
    kind = "" if weight.is_floating_point() else f"{str(weight.dtype).removeprefix('torch.')} "
    return f"{kind}{list(weight.shape)}"
