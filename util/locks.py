"""Locks on open files, which the operating system releases whenever and however their process ends."""

from __future__ import annotations

import sys
from io import IOBase

if sys.platform == "win32":
    import msvcrt

    FAR = 2**30  # beyond the end of the file: on Windows, nobody else can read locked bytes

    def _lock(file: IOBase) -> None:
        file.seek(FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(0)
else:
    import fcntl

    def _lock(file: IOBase) -> None:
        # A lock of `flock` would survive in every forked process that loads data; this one belongs to a single process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IOBase) -> bool:
    """Lock a file that is open for writing; return False if another process holds its lock.

    On POSIX the lock ends as soon as this process closes any handle of the file, not only this one.

    Raises:
        OSError: if the file system does not support locks.
    """
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        return False
    return True
