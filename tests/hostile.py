"""Hostile checkpoints: values that a file may hold instead of the expected ones, and the places for them."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import math
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Colour(enum.Enum):
    RED = 1


class Unknown:
    """An object of a class that no valid checkpoint contains."""


class Calls:
    """An object whose file calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def shared_list(depth: int = 60) -> list[Any]:
    """Return nested lists, each of which holds the next one twice: 2**60 entries in a small file."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


def cyclic_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def cyclic_dict() -> dict[Any, Any]:
    value: dict[Any, Any] = {}
    value["model"] = value["args"] = value[0] = value
    return value


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = None
    for _ in range(depth):
        value = make(value)
    return value


def huge(*shape: int) -> torch.Tensor:
    """Return a tensor that repeats a single stored number."""
    return torch.zeros(1).expand(*shape)


PLAIN: dict[str, Any] = {
    **{"none": None, "true": True, "zero": 0, "minus one": -1, "large": 10**6, "2**64": 2**64, "huge": 10**5000},
    **{
        "real": 1.5,
        "nan": math.nan,
        "infinite": math.inf,
        "complex": 1 + 2j,
        "bytes": b"\x00" * 10,
        "array of bytes": bytearray(8),
    },
    **{
        "empty text": "",
        "text": "resnet50",
        "long text": "x" * 10**6,
        "control": "\x1b[2J\nline\u202e\x00",
        "surrogate": "\ud800",
    },
    **{"list": [], "lists": [[], [1]], "tuple": (1, 2, 3), "set": {1}, "frozen set": frozenset({1}), "range": range(3)},
    **{"dict": {}, "numbered": {0: 1}, "named": {"a": "b"}, "mixed keys": {None: 1, (1, 2): 2, 1.5: 3, b"x": 4}},
    **{"ordered": collections.OrderedDict(a=1), "counter": collections.Counter("ab"), "deque": collections.deque([1])},
    **{"defaultdict": collections.defaultdict(list, a=1), "namespace": argparse.Namespace(a=1)},
    **{"path": pathlib.PurePosixPath("a/b"), "windows path": pathlib.PureWindowsPath("a/b")},
    **{
        "numpy int": np.int64(3),
        "numpy real": np.float32(2.5),
        "numpy bool": np.bool_(True),
        "numpy text": np.str_("a"),
    },
    **{"numpy array": np.zeros((2, 3)), "numpy empty": np.zeros((0, 10**6)), "numpy objects": np.array([Unknown()])},
    **{"numpy records": np.zeros(2, [("a", "i4")]), "numpy date": np.datetime64("2020-01-01")},
    **{"shared lists": shared_list(), "cyclic list": cyclic_list(), "cyclic dict": cyclic_dict()},
    **{"deep lists": nested(300, lambda v: [v]), "deep dicts": nested(300, lambda v: {"model": v})},
    **{"deep tuples": nested(300, lambda v: (v, 1)), "tuple as key": {nested(200, lambda v: (v,)): 1}},
}
OBJECTS: dict[str, Any] = {
    **{"object": Unknown(), "class": Unknown, "member": Colour.RED, "function": math.sqrt, "type": int},
    **{"date": datetime.datetime(2020, 1, 1), "decimal": decimal.Decimal(1), "fraction": fractions.Fraction(1, 2)},
    **{"simple namespace": types.SimpleNamespace(a=1), "partial": functools.partial(print, 1), "slice": slice(3)},
    **{"module": torch.nn.Linear(1, 1), "generator": np.random.default_rng(0), "dtype": torch.float32},
    **{"device": torch.device("cpu"), "size": torch.Size([1, 2]), "storage": torch.zeros(2).untyped_storage()},
}
TENSORS: dict[str, torch.Tensor] = {
    **{"0-d": torch.zeros(()), "empty": torch.zeros(0), "0 columns": torch.zeros(10**6, 0), "1-d": torch.zeros(5)},
    **{
        "nan tensor": torch.full((8, 32), math.nan),
        "5-d": torch.zeros(1, 1, 1, 1, 1),
        "64 dims": torch.zeros([1] * 64),
    },
    **{"integers": torch.zeros(8, 32, dtype=torch.int64), "bytes tensor": torch.zeros(8, 32, dtype=torch.uint8)},
    **{"bools": torch.zeros(8, 32, dtype=torch.bool), "complex tensor": torch.zeros(8, 32, dtype=torch.complex64)},
    **{"float8": torch.zeros(8, 32).to(torch.float8_e4m3fn), "half": torch.zeros(8, 32).half()},
    **{"double": torch.zeros(8, 32).double(), "conjugate": torch.zeros(8, 32, dtype=torch.complex64).conj()},
    **{"10**12 numbers": huge(10**12), "10**6 x 10**6": huge(10**6, 10**6), "2**62": huge(2**31, 2**31)},
    **{
        "stride 0": huge(8, 32),
        "transposed": torch.zeros(32, 8).T,
        "part of a large one": torch.zeros(10**6)[:256].view(8, 32),
    },
    **{
        "sparse": torch.zeros(8, 32).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "meta": torch.zeros(8, 32, device="meta"),
    },
    **{"huge sparse": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (2**40,))},
    **{
        "huge meta": torch.empty(10**6, 10**6, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.zeros(8, 32), 0.1, 0, torch.qint8),
    },
    **{"parameter": torch.nn.Parameter(torch.zeros(8, 32)), "with gradient": torch.zeros(8, 32, requires_grad=True)},
    **{"nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
}
VALUES = PLAIN | OBJECTS | TENSORS
WEIGHT, NORM, COUNTER = (
    "query_embed.weight",
    "backbone.0.body.bn1.running_var",
    "backbone.0.body.bn1.num_batches_tracked",
)
HEAD = "class_embed.bias"
FLAGS = (
    *("enc_layers", "hidden_dim", "nheads", "num_queries", "backbone", "dilation", "lr", "batch_size", "min_size"),
    *("position_embedding", "seed", "device", "dropout", "backbone_norm", "accum_steps", "lr_drop", "max_detections"),
    *("num_classes", "amp", "output_dir", "coco_path"),
)
FIRST = ("processes", 0)
PLACES: tuple[tuple[Any, ...], ...] = (
    *((key,) for key in ("model", "args", "class_names", "class_ids", "epoch", "ap", "optimizer", "lr_scheduler")),
    *((key,) for key in ("step", "skipped", "scaler", "processes", "train_stats", "unknown")),
    *(("model", key) for key in (WEIGHT, NORM, COUNTER, HEAD, "class_embed.weight", "unknown.weight")),
    *(("args", flag) for flag in FLAGS),
    *(("class_names", 1), ("class_ids", 1), ("train_stats", "train_loss")),
    *(("optimizer", "state"), ("optimizer", "state", 0), ("optimizer", "state", 0, "exp_avg")),
    *(("optimizer", "state", 0, "step"), ("optimizer", "param_groups"), ("optimizer", "param_groups", 0)),
    *(("optimizer", "param_groups", 0, "params"), ("optimizer", "param_groups", 0, "lr")),
    *(FIRST, (*FIRST, "random"), (*FIRST, "meters"), (*FIRST, "meters", "loss"), (*FIRST, "meters", "loss", "window")),
    *((*FIRST, "random", key) for key in ("torch", "numpy", "python")),
    *((*FIRST, "random", "torch", key) for key in ("cpu", "cuda")),
    *((*FIRST, "random", "numpy", i) for i in range(5)),
    *((*FIRST, "random", "python", i) for i in range(3)),
    *((*FIRST, "meters", "loss", key) for key in ("total", "count")),
)


def replaced(contents: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of dicts and lists with another value at the end of a path of keys."""
    if not path:
        return value
    copy = contents.copy() if isinstance(contents, dict) else list(contents)
    if isinstance(copy, dict) and path[0] not in copy:
        copy[path[0]] = {}
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def text_of(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
