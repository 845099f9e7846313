"""Scan of the instructions of a pickle before it is loaded; nothing is built or called.

`torch.load(weights_only=True)` runs no code, but builds everything that a file asks for: buffers of any size, tensors
larger than their file, tuples nested so deeply that their use as keys overflows the stack. The scan refuses such
files, and names the type of an object that is not plain data.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any, NamedTuple

from util.errors import InputError

MOST_INSTRUCTIONS = 10_000_000  # more would take over a minute; a checkpoint of 100 processes has 1,000,000
NEWEST_PROTOCOL = 3  # torch.save uses 2
MOST_NESTED = 20  # depth of tuples within tuples, which Python hashes without a limit
# Bytes per element; complex and quantised numbers do not occur in models.
STORAGES = {
    **dict.fromkeys(("torch.DoubleStorage", "torch.LongStorage"), 8),
    **dict.fromkeys(("torch.FloatStorage", "torch.IntStorage"), 4),
    **dict.fromkeys(("torch.HalfStorage", "torch.BFloat16Storage", "torch.ShortStorage"), 2),
    **dict.fromkeys(("torch.CharStorage", "torch.ByteStorage", "torch.BoolStorage"), 1),
    **dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), 1),
}
GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"})


class Global(str):
    """Name of a class or function."""


class Nested(NamedTuple):
    """Tuple in a pickle: its items, and the depth of tuples within it."""

    items: list[Any]
    depth: int


def scan_pickle(file: IO[bytes], source: object, allowed: Collection[str], bytes_of: Callable[[Any], int]) -> None:
    """Scan one pickle, and leave `file` at its end.

    Args:
        file: positioned at the start of the pickle.
        source: the name of the file in errors.
        allowed: the names of classes and functions that it may use.
        bytes_of: returns the number of bytes that the file stores for the storage of a key.

    Raises:
        InputError: if it uses other names, or asks for more memory than its file can fill.
        LookupError, TypeError, ValueError, AttributeError: if it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        name = instruction.name
        if name == "PROTO" and argument > NEWEST_PROTOCOL:
            raise InputError(
                f"{source}: saved by pickle protocol {argument}, which torch.load does not read without running code; "
                "save it again by torch.save, without pickle_protocol"
            )
        if number > MOST_INSTRUCTIONS:
            raise InputError(f"{source}: refused because it contains more data besides tensors than any checkpoint")
        if name == "MARK":
            marks.append(len(stack))
        elif name in PUTS:
            memo[argument] = stack[-1]
        elif name in GETS:
            stack.append(memo[argument])
        else:
            needed = instruction.stack_before
            start = marks.pop() if pickletools.markobject in needed else len(stack)
            start -= needed.index(pickletools.markobject) if pickletools.markobject in needed else len(needed)
            if start < 0:
                raise ValueError("damaged")
            taken, stack[start:] = stack[start:], []
            stack += _results(instruction, argument, taken, source, allowed, bytes_of)


def _results(
    instruction: pickletools.OpcodeInfo,
    argument: Any,
    taken: list[Any],
    source: object,
    allowed: Collection[str],
    bytes_of: Callable[[Any], int],
) -> list[Any]:
    """Return the results of an instruction for the stack: names, texts, integers and tuples; None for all others."""
    name = instruction.name
    if name in ("GLOBAL", "STACK_GLOBAL"):
        wanted = argument.replace(" ", ".") if argument else ".".join(map(str, taken))
        if wanted not in allowed and wanted not in STORAGES:
            raise InputError(
                f"{source}: refused because it contains code or objects other than tensors and plain data: "
                f"{_described(wanted)}"
            )
        return [Global(wanted)]
    if name in TUPLES:
        depth = 1 + max((item.depth for item in taken if isinstance(item, Nested)), default=0)
        if depth > MOST_NESTED:
            raise InputError(f"{source}: refused because it contains tuples nested more than {MOST_NESTED} deep")
        return [Nested(taken, depth)]
    if name == "REDUCE" and taken[0] == "_codecs.encode" and taken[1].items[1] not in ("latin1", "latin-1"):
        raise InputError(f"{source}: refused because it contains encoded data other than tensors and plain data")
    if name == "BINPERSID":
        _, kind, key, _, length, *_ = taken[0].items  # of a storage
        if length * STORAGES[kind] > bytes_of(key):
            raise InputError(f"{source}: damaged: a tensor claims {length:,} numbers, more than the file holds")
    if instruction.stack_after and isinstance(argument, str | int):
        return [argument]
    return [None] * len(instruction.stack_after)


def _described(name: str) -> str:
    prefix = "torch._utils._rebuild_"
    if name.startswith(prefix):
        return f"a tensor that is not a plain one ({name.removeprefix(prefix).replace('_', ' ')})"
    if name.startswith("torch.") and name.endswith("Storage"):
        return f"a tensor that is not a plain one ({name.removeprefix('torch.').removesuffix('Storage')})"
    return f"an object of type {name.removeprefix('__builtin__.')}"
