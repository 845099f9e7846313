"""Search for the state dict of a model in the dicts in which training scripts store it.

A file may contain a state dict itself, or dicts of them: `{"model": ..}`, Lightning's `{"state_dict": ..}`, averaged
weights next to the raw ones (`{"model_ema": ..}`, `{"ema": {"module": ..}}`). DistributedDataParallel, torch.compile
and Lightning also add prefixes to the names of weights. The path of a state dict consists of the keys that lead to it
and the prefix, as in `state_dict.model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from checkpoints.schema import shown
from util.errors import InputError
from util.text import counted

PARTS = frozenset({"backbone", "input_proj", "transformer", "query_embed", "class_embed", "bbox_embed"})
PARTS |= {"detr", "bbox_attention", "mask_head"}  # of a model with masks
WRAPPERS = frozenset({"model", "module", "_orig_mod", "state_dict", "model_state_dict", "net", "network", "weights"})
AVERAGED = frozenset({"ema", "swa", "avg", "averaged"})  # words in names such as model_ema and ema_state_dict
MOST_WRAPPED = 3  # dicts within each other
CLASS_HEADS_OF_HUGGING_FACE = {"class_labels_classifier.bias", "detr.class_labels_classifier.bias"}


def with_plain_weights(contents: Any, source: object, averaged: bool) -> tuple[dict[str, Any], str]:
    """Return the contents of a file with the weights under `model`, by their plain names, and a line for the user.

    The line says which weights were chosen; it is empty if the file has only those under `model`.

    Args:
        contents: the contents of a file.
        source: the name of the file in messages.
        averaged: prefer averaged to raw weights if there are both.

    Raises:
        InputError: if there are no weights; the message describes the contents.
    """
    for weights in (contents, contents.get("model")) if isinstance(contents, dict) else ():
        if isinstance(weights, dict) and not CLASS_HEADS_OF_HUGGING_FACE.isdisjoint(weights):
            raise InputError(f"{source}: the weights of a Hugging Face model; name its folder")
    found = dict(_state_dicts(contents, (), set()))
    if not found:
        raise InputError(f"{source}: {_description(contents)}")
    paths = sorted(found, key=lambda path: path != ("model",))  # `model` first, then the order in the file
    path = next((path for path in paths if _averages(path) == averaged), paths[0])
    rest = contents if path and path[0] in contents else {}  # a bare state dict has no other data
    if path == ("model",) and len(found) == 1:
        return rest | {"model": found[path]}, ""
    others = [_text(other) for other in found if other != path]
    kind = "averaged " if _averages(path) else "raw " if others else ""
    left = f", not those in {', '.join(others)}" if others else ""
    weights, line = found[path], f"{source}: taking the {kind}weights in {_text(path)}{left}"
    raw = next((other for other in paths if not _averages(other)), path) if _averages(path) else path
    constant = {key: value for key, value in found[raw].items() if "backbone." in key and key not in weights}
    if constant:  # averages of parameters lack norm statistics, and those of trained parameters lack frozen layers
        line += f", except for {counted(len(constant), 'tensor')} of the backbone without averages"
    return rest | {"model": weights | constant}, line


def _state_dicts(contents: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yield (path, state dict) for the state dicts in a dict and in the dicts that it wraps."""
    if not isinstance(contents, dict) or id(contents) in seen or len(path) > MOST_WRAPPED:
        return
    seen.add(id(contents))  # so that dicts that contain each other many times cost nothing
    by_prefix: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, value in contents.items():
        if isinstance(key, str) and (path or isinstance(value, Tensor)):  # the top level holds other data, too
            parts = key.split(".")
            length = next((i for i, part in enumerate(parts) if not _is_wrapper(part)), len(parts))
            name = ".".join(part for part in parts[length:] if part != "_orig_mod")
            by_prefix.setdefault(tuple(parts[:length]), {})[name] = value
    for prefix, weights in by_prefix.items():
        if any(name.partition(".")[0] in PARTS for name in weights):
            yield path + prefix, weights
    for key, value in contents.items():
        if isinstance(key, str) and _is_wrapper(key):
            yield from _state_dicts(value, (*path, key), seen)


def _is_wrapper(key: str) -> bool:
    return key in WRAPPERS or _is_averaged(key)


def _is_averaged(key: str) -> bool:
    return not AVERAGED.isdisjoint(key.split("_"))


def _averages(path: tuple[str, ...]) -> bool:
    """Return whether the weights at a path are averaged weights."""
    return any(map(_is_averaged, path))


def _text(path: tuple[str, ...]) -> str:
    return ".".join(path) or "its top level"


def _description(contents: Any) -> str:
    """Describe contents without weights, and the expected contents."""
    if not isinstance(contents, dict):
        return f"holds no 'model': it is {shown(contents)}; expected a dict with the key model"
    model = contents.get("model")
    model = model if isinstance(model, dict) else {}
    holds = f"it holds {_keys(contents)}" + f", and its model {_keys(model)}" * ("model" in contents)
    return f"holds no 'model' of Conditional DETR: {holds}; expected model with keys such as query_embed.weight"


def _keys(contents: dict[Any, Any], most: int = 5) -> str:
    names = [key[:60] if isinstance(key, str) else shown(key) for key in list(contents)[:most]]
    return f"the keys {', '.join(names)}{', ..' * (len(contents) > most)}" if names else "nothing"
