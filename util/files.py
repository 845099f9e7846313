"""Writing files so that an interruption at any moment leaves either the old or the new contents."""

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
ABANDONED = 3600  # seconds without a byte, after which nobody is downloading a file any more
LONGEST_STEM = 50  # characters of at most 4 bytes each, so that a temporary name has fewer than 255 bytes
SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# By folder, what raises InputError once that folder is no longer the one that this process has locked.
folder_checks: dict[Path, Callable[[], None]] = {}
_being_written: set[Path] = set()  # by this process, whose own locks do not keep it out


@contextlib.contextmanager
def replacing(path: Path, keep_old_as: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file to write to, which takes the place of `path` once it is completely on the disk.

    Args:
        path: what is written; its folder is made if need be.
        keep_old_as: where the old file goes; between the two renames only `path` is missing.

    Raises:
        InputError: the disk is full, the folder is not writable, or a folder that this process has locked is gone;
            what was there before is intact.
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
    except (OSError, RuntimeError) as error:  # torch.save's writer turns some of the system's errors into its own
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
    """Open a new file whose name begins like `stem` and is its own, and lock it as long as it is open."""
    while True:
        temporary = stem.with_name(f"{stem.name}.{secrets.token_hex(4)}.tmp")
        _being_written.add(temporary)
        file = temporary.open("xb")
        with contextlib.suppress(OSError):  # without locks, `remove_leftovers` removes nothing either
            try_lock(file)
        if temporary.exists():
            return file, temporary
        _being_written.discard(temporary)
        file.close()  # `remove_leftovers` of another process came between the two lines above


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove the temporary files that dead processes have left in a folder, of those that match a pattern."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # one that cannot be removed does no harm
            is_ours = TEMPORARY.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode)
            if is_ours and path not in _being_written:
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    if os.name == "nt":
        path.unlink()  # Windows refuses where a process has the file open
        return
    with path.open("r+b") as file:
        if try_lock(file):
            path.unlink()


def download(url: str, path: Path, hash_prefix: str | None = None, progress: bool = True) -> None:
    """Download a file; torch does so under a temporary name of its own, which the next process to need it cleans up.

    Args:
        hash_prefix: the beginning of the file's SHA-256; None: any.

    Raises:
        OSError, RuntimeError: it cannot be had, or is another file.
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
    """Return what a path is other than a regular file, such as "a named pipe"; "" for a regular or missing file.

    To open such a thing may wait forever.
    """
    try:
        return SPECIAL_FILES.get(stat.S_IFMT(path.stat().st_mode), "")
    except (OSError, ValueError):  # a path with a NUL byte cannot be there either
        return ""


def check_is_file(path: Path) -> None:
    """Raise InputError if there is something other than a regular file at `path`."""
    if kind := special_file(path):
        raise InputError(f"{path}: is {kind}, not a file")
