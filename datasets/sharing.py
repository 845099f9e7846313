"""Sharing of an annotation file: one process reads it and sends it to all processes of a run as arrays.

To read the file, a process needs a CPU core for some time, and 20 times the memory of the arrays.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasets.classes import Classes
from datasets.records import Records
from util.distributed import broadcast_bytes, is_main_process
from util.errors import InputError

CLASS_TABLES = ("ids", "names", "isthing")  # of `Classes`, by label; as keys in JSON, labels would become texts


@dataclass
class Contents:
    """The parts of an annotation file that a data set keeps; see `datasets.annotations.Annotations`."""

    records: Records
    classes: Classes
    image_ids: dict[int, str | int]
    notes: list[str]


def read_once(read: Callable[[], Contents]) -> Contents:
    """Call `read` on the first process, and return its result on all processes, which must call this together.

    Raise InputError on all processes if `read` raises it.
    """
    message = b""
    if is_main_process():
        try:
            message = pack(read())
        except InputError as error:
            message = pack_arrays({}, {"error": str(error)})
    return unpack(broadcast_bytes(message))


def pack(contents: Contents) -> bytes:
    """Return contents as the bytes of a file of NumPy arrays, without pickled objects."""
    classes = asdict(contents.classes)
    plain = {
        "classes": classes | {table: list(classes[table].items()) for table in CLASS_TABLES},
        "image_ids": list(contents.image_ids.items()),
        "notes": contents.notes,
    }
    return pack_arrays(contents.records.to_arrays(), plain)


def pack_arrays(arrays: dict[str, np.ndarray], plain: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    contents: dict[str, Any] = arrays | {"plain": np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)}
    np.savez(file, **contents)
    return file.getvalue()


def unpack(message: bytes) -> Contents:
    """Return the contents that `pack` converted to bytes; raise InputError if the first process could not read them."""
    arrays = dict(np.load(io.BytesIO(message), allow_pickle=False))
    plain = json.loads(arrays.pop("plain").tobytes())
    if "error" in plain:
        raise InputError(plain["error"])
    classes = plain["classes"]
    classes |= {table: dict(classes[table]) for table in CLASS_TABLES}
    return Contents(Records.from_arrays(arrays), Classes(**classes), dict(plain["image_ids"]), plain["notes"])
