"""Reading of untrusted files of `torch.save`: tensors and plain data are loaded, all other objects are refused."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from checkpoints.pickle_scan import scan_pickle
from util.errors import InputError, reason
from util.files import check_is_file

ZIP = b"PK\x03\x04"  # the first bytes of files of torch 1.6 and later
PICKLES_BEFORE_ZIP = 5  # in files of earlier versions: magic number, version, system, contents, keys of storages

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
FACTORIES = ("dict", "float", "int", "list", "str")  # of defaultdicts
FROM_TORCH = {
    *("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "__builtin__.set"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    *("torch.nn.parameter.Parameter", "torch.Size", "torch.device", *(f"torch.{name}" for name in DTYPES)),
}


class NotPlain(Exception):
    """Error for data of a type that is not loaded; the message names the type."""


class NumpyType:
    """Stand-in for a `numpy.dtype` in a file; the real class would accept any memory layout."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.name = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = state[1].replace("|", "") + self.name

    def read(self, contents: bytes) -> np.ndarray:
        """Return the numbers or texts that bytes encode. Raise NotPlain for other types."""
        if not re.fullmatch(r"[<>=]?([biuf]\d{1,2}|U\d{1,9})", self.name):
            raise NotPlain(f"NumPy data of type {self.name[:60]}")
        return np.frombuffer(contents, self.name)


class NumpyArray(list):
    """Stand-in for a `numpy.ndarray` in a file: nested lists of Python numbers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_first, contents = state
        if contents:  # without any bytes, a shape could still ask for many empty lists
            self[:] = dtype.read(contents).reshape(shape, order="F" if column_first else "C").tolist()


def numpy_array(*_: Any) -> NumpyArray:
    return NumpyArray()


def numpy_scalar(dtype: NumpyType, contents: bytes) -> float:
    return dtype.read(contents)[0].item()


def posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def empty_bytes(*_: Any) -> bytes:
    return b""


def plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


# Replacements for types that are common in checkpoints, but that torch does not load by itself.
STAND_INS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": plain_dict,
    **{f"{module}.{name}": plain_dict for module in ("builtins", "__builtin__") for name in FACTORIES},
    **{f"{module}.bytes": empty_bytes for module in ("builtins", "__builtin__")},  # of empty arrays
    "numpy.dtype": NumpyType,
    "numpy.ndarray": NumpyArray,
    **{f"numpy.{core}.multiarray._reconstruct": numpy_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": numpy_scalar for core in ("core", "_core")},
    **{f"{module}.{kind}PosixPath": posix_path for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")},
    **{
        f"{module}.{kind}WindowsPath": windows_path for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")
    },
}


def load_file(path: Path, source: str | Path) -> Any:
    """Return the contents of a file of `torch.save`, on the CPU: tensors and plain data.

    NumPy's scalars become numbers and its arrays lists, paths become texts, and defaultdicts become dicts.

    Args:
        path: the file.
        source: the name of the file in errors.

    Raises:
        InputError: if it cannot be read, or contains an object of another type, which the message names.
    """
    check_is_file(path)
    try:
        _scan(path, source)
        names = [(stand_in, name) for name, stand_in in STAND_INS.items()]
        with torch.serialization.safe_globals([*names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except NotPlain as error:
        raise InputError(f"{source}: refused because it contains {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or reason(error)})") from error
    except Exception as error:  # for damaged files, torch.load raises errors of many types
        raise InputError(f"{source}: not a checkpoint, or a damaged one ({reason(error).split('. ')[0]})") from error


def _scan(path: Path, source: str | Path) -> None:
    """Scan the pickles of a file; see `scan_pickle`."""
    allowed = FROM_TORCH | STAND_INS.keys()
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            file.seek(0)
            for _ in range(PICKLES_BEFORE_ZIP):
                scan_pickle(file, source, allowed, lambda _: size)
            return
        with zipfile.ZipFile(file) as archive:
            records = {entry.filename: entry for entry in archive.infolist()}
            if sum(entry.file_size for entry in archive.infolist()) > size:  # torch compresses nothing
                raise InputError(f"{source}: refused because it is compressed, which no checkpoint is")
            (contents,) = (name for name in records if name.endswith("/data.pkl") or name == "data.pkl")
            folder = contents.removesuffix("data.pkl")
            with archive.open(contents) as pickle:
                scan_pickle(pickle, source, allowed, lambda key: records[f"{folder}data/{key}"].file_size)
