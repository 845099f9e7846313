"""Checks that declare the structure of untrusted data, as in `checkpoints.checkpoint_schema`.

A check is a function of a value and its place, such as "c.pth: args". It returns the value, converted if necessary, or
raises InputError with the place. Data without a check is dropped unread. Checks read data only as deep as they are
declared, so that deep nesting, cycles and lists that contain each other many times cost neither time nor memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from util.errors import InputError, reason

Check = Callable[[Any, str], Any]

LONGEST_TEXT = 1000  # characters


def shown(value: Any) -> str:
    """Describe any value in a few words, without reading its contents."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}.."
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print very long integers
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, Tensor):
        return described_tensor(value)
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def described_tensor(tensor: Tensor) -> str:
    """Describe a tensor by its type and shape."""
    return f"a tensor of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def wrong(value: Any, place: str, expected: str) -> InputError:
    """Return the error for an unexpected value."""
    return InputError(f"{place} is {shown(value)}, not {expected}")


def integer(least: int = 0, most: int = 2**63 - 1) -> Check:
    """Return a check for an integer from `least` to `most`."""

    def check(value: Any, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise wrong(value, place, f"an integer from {least} to {most}")
        return value

    return check


def label(value: Any, place: str) -> int:
    """Return an integer from 0; texts of digits, such as keys of JSON objects, are converted."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    return integer(0, 10**9)(value, place)


def real(least: float = -math.inf, most: float = math.inf) -> Check:
    """Return a check for a number from `least` to `most`; without limits, it may be NaN."""

    def check(value: Any, place: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong(value, place, "a number")
        if (isinstance(value, int) and abs(value) > 2**1023) or value < least or value > most:
            raise wrong(value, place, f"a number from {least:g} to {most:g}")
        if math.isnan(value) and (least, most) != (-math.inf, math.inf):
            raise wrong(value, place, f"a number from {least:g} to {most:g}")
        return value

    return check


def boolean(value: Any, place: str) -> bool:
    """Return a value that is True or False."""
    if not isinstance(value, bool):
        raise wrong(value, place, "True or False")
    return value


def text(value: Any, place: str) -> str:
    """Return a text of at most `LONGEST_TEXT` characters."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise wrong(value, place, f"a text of at most {LONGEST_TEXT:,} characters")
    return value


def one_of(*choices: Any) -> Check:
    """Return a check for a value that is one of `choices`."""

    def check(value: Any, place: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise wrong(value, place, f"one of {', '.join(map(str, choices))}")
        return value

    return check


def either(*checks: Check) -> Check:
    """Return a check that accepts a value if one of several checks does; the error comes from the last check."""

    def check(value: Any, place: str) -> Any:
        for attempt in checks[:-1]:
            try:
                return attempt(value, place)
            except InputError:
                continue
        return checks[-1](value, place)

    return check


def list_of(item: Check, least: int = 0, most: int = 10**6) -> Check:
    """Return a check for a list or tuple of `least` to `most` items, which returns a list."""

    def check(value: Any, place: str) -> list[Any]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise wrong(value, place, f"a list of {least}" + (f" to {most}" if most != least else ""))
        return [item(entry, f"{place}[{i}]") for i, entry in enumerate(value)]

    return check


def integers(length: int | None, most: int) -> Check:
    """Return a check for a list or tuple of integers from 0 to `most`, which returns a list; fast for thousands."""

    def check(value: Any, place: str) -> list[int]:
        if not isinstance(value, list | tuple) or len(value) != (len(value) if length is None else length):
            raise wrong(value, place, "a list of integers" if length is None else f"a list of {length} integers")
        if not all(type(entry) is int for entry in value) or (value and not 0 <= min(value) <= max(value) <= most):
            raise InputError(f"{place} contains other values than integers from 0 to {most}")
        return list(value)

    return check


def items(*checks: Check) -> Check:
    """Return a check for a list or tuple with one item per check, which returns a list."""

    def check(value: Any, place: str) -> list[Any]:
        entries = list_of(lambda entry, _: entry, len(checks), len(checks))(value, place)
        return [check(entry, f"{place}[{i}]") for i, (check, entry) in enumerate(zip(checks, entries, strict=True))]

    return check


def table_of(key: Check, value: Check, most: int = 10**6) -> Check:
    """Return a check for a dict whose keys and values are checked by `key` and `value`."""

    def check(table: Any, place: str) -> dict[Any, Any]:
        if not isinstance(table, dict) or len(table) > most:
            raise wrong(table, place, f"a dict of at most {most:,} entries")
        checked = {}
        for name, entry in table.items():
            name = key(name, f"a key of {place}")
            checked[name] = value(entry, f"{place}[{shown(name)}]")
        return checked

    return check


def record(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """Return a check for a dict with a check per key; other keys, and optional keys that are None, are dropped."""

    def check(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(value, place, "a dict")
        if missing := [name for name in required if name not in value]:
            raise InputError(f"{place} has no {missing[0]!r}")
        separator = "." if not place.endswith(":") else " "
        return {
            name: check(value[name], f"{place}{separator}{name}")
            for name, check in ((optional or {}) | required).items()
            if name in required or value.get(name) is not None
        }

    return check


def tensor(*dtypes: torch.dtype, dims: int | None = None) -> Check:
    """Return a check for a dense CPU tensor of one of `dtypes` with `dims` dimensions; it returns it detached."""

    def check(value: Any, place: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise wrong(value, place, "a tensor")
        if value.is_nested or value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InputError(f"{place} is a sparse, quantised, nested or meta tensor; only plain tensors are loaded")
        if value.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise wrong(value, place, f"a tensor of {names}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{place} is {described_tensor(value)}, of which the file holds only a part")
        if dims is not None and value.dim() != dims:
            raise wrong(value, place, f"a tensor of {dims} dimensions")
        return value.detach()

    return check


def from_json(contents: str, place: str) -> Any:
    """Return the value of a JSON text. Raise InputError if it is damaged or nested too deeply."""
    try:
        return json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be read ({reason(error)})") from error
