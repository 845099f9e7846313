"""Writing files so that an interruption at any moment leaves either the old or the new contents."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from util.errors import InputError, reason


@contextlib.contextmanager
def replacing(path: Path, keep_old_as: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` once it is wholly on the disk.

    Args:
        keep_old_as: where the old file goes; between the two renames only `path` is missing.

    Raises:
        InputError: where the disk is full or the folder not writable; what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as and path.exists():
            path.replace(keep_old_as)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save's writer turns some of the system's errors into its own
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{path}: cannot be written ({reason(cause)}); what was there before is intact") from error
