"""Atomic writing of files: an interruption at any moment leaves either the old or the new contents."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.distributed import is_main_process
from util.errors import InputError, reason
from util.locks import try_lock

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")
ABANDONED = 3600  # seconds without a new byte, after which a download counts as abandoned
LONGEST_STEM = 50  # characters of at most 4 bytes each, so that a temporary name has fewer than 255 bytes
SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Folders that this process has locked, each with a function that raises InputError if the folder is gone or replaced.
folder_checks: dict[Path, Callable[[], None]] = {}
_being_written: set[Path] = set()  # temporary files of this process, which ignores its own locks


@contextlib.contextmanager
def replacing(path: Path, keep_old_as: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, which replaces `path` once it is complete and on the disk.

    Args:
        path: the file; its folder is created if necessary.
        keep_old_as: the path to which the old file is renamed first; for a moment, there is no file at `path`.

    Raises:
        InputError: if the disk is full, the folder is not writable, or a folder that this process has locked is gone;
            the old file is intact.
    """
    check_folder(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stem = f".{path.name[:LONGEST_STEM]}"
        remove_leftovers(path.parent, f"{glob.escape(stem)}.*.tmp")
        file, temporary = _create_temporary(path.with_name(stem))
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            check_folder(path)
            if os.name == "nt":  # Windows renames closed files only
                file.close()
            if keep_old_as and path.is_file():
                path.replace(keep_old_as)
            temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns some errors of the system into RuntimeError
        check_folder(path)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{path}: cannot be written ({reason(cause)}); what was there before is intact") from error
    finally:
        if temporary:
            _being_written.discard(temporary)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def save_on_master(contents: Any, path: str | Path, keep_old_as: Path | None = None) -> None:
    """Write `torch.save(contents)` on the main process through a temporary file, as `replacing` does."""
    if is_main_process():
        with replacing(Path(path), keep_old_as) as file:
            torch.save(contents, file)


def _create_temporary(stem: Path) -> tuple[BinaryIO, Path]:
    """Open a new file with a unique name that begins with `stem`, and lock it while it is open."""
    while True:
        temporary = stem.with_name(f"{stem.name}.{secrets.token_hex(4)}.tmp")
        _being_written.add(temporary)
        file = temporary.open("xb")
        with contextlib.suppress(OSError):  # without locks, `remove_leftovers` removes nothing either
            try_lock(file)
        if temporary.exists():
            return file, temporary
        _being_written.discard(temporary)
        file.close()  # another process called `remove_leftovers` between creation and lock


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove the temporary files that match a pattern and were left in a folder by dead processes."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # a file that cannot be removed does no harm
            is_ours = TEMPORARY.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode)
            if is_ours and path not in _being_written:
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    if os.name == "nt":
        path.unlink()  # Windows refuses if a process has the file open
        return
    with path.open("r+b") as file:
        if try_lock(file):
            path.unlink()


def download(url: str, path: Path, hash_prefix: str | None = None, progress: bool = True) -> None:
    """Download a file under a temporary name and rename it; first remove files of abandoned downloads.

    Args:
        hash_prefix: the beginning of the file's SHA-256; None: any.

    Raises:
        OSError, RuntimeError: if it cannot be downloaded, or has another hash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED:
                partial.unlink()
    torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=progress)


def check_folder(path: Path) -> None:
    """Raise InputError if `path` lies in a folder that this process has locked, and that folder is gone."""
    for folder, check in list(folder_checks.items()):
        if path.absolute().is_relative_to(folder):
            check()


def special_file(path: Path) -> str:
    """Return the kind of a path that is not a regular file, such as "a named pipe"; "" for a regular or missing file.

    Opening such a file may block forever.
    """
    try:
        return SPECIAL_FILES.get(stat.S_IFMT(path.stat().st_mode), "")
    except (OSError, ValueError):  # a path with a NUL byte cannot exist either
        return ""


def check_is_file(path: Path) -> None:
    """Raise InputError if there is something other than a regular file at `path`."""
    if kind := special_file(path):
        raise InputError(f"{path}: is {kind}, not a file")
