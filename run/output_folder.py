"""The folder of `--output_dir`, to which one run at a time writes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from io import FileIO
from pathlib import Path

from util.distributed import all_gather_plain, is_main_process
from util.errors import InputError
from util.files import check_is_file, folder_checks, remove_leftovers, special_file
from util.locks import try_lock
from util.logger import log, warn

# An evaluation has a separate lock: it writes other files than training, which may use the folder at the same time.
TRAINING_LOCK, EVALUATION_LOCK = ".train.lock", ".eval.lock"
TRAINING_FILES = ("checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth", "log.txt")
PATIENCE = 60  # seconds to wait until the process that holds the lock has ended
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # set by schedulers, which restart jobs when nobody is watching
LONGEST_COMMAND = 200  # characters


@contextlib.contextmanager
def claim_output_dir(args: argparse.Namespace) -> Iterator[Path | None]:
    """Yield the folder of `--output_dir`, created if necessary and locked against other runs; None without the flag.

    The main process holds the lock, and all processes wait for it. Temporary files of dead runs are removed.

    Raises:
        InputError: on all processes, if another run uses the folder, or the folder cannot be used.
    """
    if not args.output_dir:
        yield None
        return
    folder = make_output_dir(args.output_dir)
    lock, error = None, ""
    if is_main_process():
        try:
            check_contents(folder, args)
            lock = FolderLock(folder / (EVALUATION_LOCK if args.eval else TRAINING_LOCK))
            lock.acquire(PATIENCE if is_restarted() else 0)
            remove_leftovers(folder)
            remove_leftovers(folder, "*/.*.tmp")
        except InputError as problem:
            error = str(problem)
    if error := all_gather_plain(error)[0]:
        raise InputError(error)
    try:
        yield folder
    finally:
        if lock:
            lock.release()


def make_output_dir(name: str) -> Path:
    """Return the folder of `--output_dir`, created if necessary."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder}: not writable")
    return folder


def check_contents(folder: Path, args: argparse.Namespace) -> None:
    """Raise InputError if a folder is in the place of a file that the run writes, or the reverse."""
    for path in (folder / name for name in TRAINING_FILES if not args.eval):
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not a file; move it elsewhere")
    for name in ("worst",) if args.eval else ("eval", *["tensorboard"] * args.tensorboard):
        path = folder / name
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is {special_file(path) or 'a file'}, not a folder; move it elsewhere")


def is_restarted() -> bool:
    """Return whether torchrun or a scheduler has, or may have, restarted this run."""
    counts = [os.environ.get(name, "0") for name in RESTART_COUNTS]
    return any(count.isdecimal() and int(count) > 0 for count in counts) or any(name in os.environ for name in JOBS)


class FolderLock:
    """Lock on a folder, which ends with this process.

    Args:
        path: the file in the folder that is locked and names its holder; deleted on release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.file: FileIO | None = None
        self.description = describe_this_process()

    def acquire(self, patience: float = 0) -> None:
        """Take the lock; if another process holds it, wait up to `patience` seconds.

        Raises:
            InputError: if another process still holds the lock; the message names that process.
        """
        deadline = time.monotonic() + patience
        waiting = False
        while not self._try():
            holder = self._holder()
            if time.monotonic() >= deadline:
                waited = f", also after {patience:g} seconds" if waiting else ""
                raise InputError(
                    f"--output_dir {self.folder}: in use by {holder}{waited}; end that run, or name another folder"
                )
            if not waiting:
                log(f"--output_dir {self.folder}: in use by {holder}; waiting up to {patience:g} seconds for it to end")
            waiting = True
            time.sleep(0.5)
        folder_checks[self.folder.absolute()] = self.check

    def check(self) -> None:
        """Raise InputError if the folder was deleted since the lock was taken, even if it was created again."""
        # Some file systems change the inode number of a file now and then; a file with the same text is ours.
        if self._is_in_place(self.file) or self._holder() == self.description:
            return
        user = f" and is in use by {self._holder()}" if self.path.exists() else ""
        raise InputError(f"--output_dir {self.folder}: was deleted during the run{user}; nothing more is saved there")

    def release(self) -> None:
        """Let other processes take the lock."""
        folder_checks.pop(self.folder.absolute(), None)
        if not self.file:
            return
        with contextlib.suppress(OSError):
            if self._is_in_place(self.file):
                if os.name == "nt":  # Windows deletes closed files only
                    self.file.close()
                self.path.unlink()
        self.file.close()

    def _try(self) -> bool:
        check_is_file(self.path)
        try:
            while file := self._open_and_lock():
                if self._is_in_place(file):
                    file.truncate(0)
                    file.write(self.description.encode())
                    self.file = file
                    return True
                file.close()  # the process that held the lock has deleted this file
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: not writable ({error.strerror})") from error
        return False

    def _open_and_lock(self) -> FileIO | None:
        """Return the open file; None if another process holds its lock."""
        file = self.path.open("a+b", buffering=0)
        try:
            if try_lock(file):
                return file
        except OSError as error:
            warn(
                f"--output_dir {self.folder}: its file system has no locks ({error.strerror}); "
                "make sure that no other run uses it"
            )
            return file
        file.close()
        return None

    def _is_in_place(self, file: FileIO | None) -> bool:
        """Return whether a file is open and is the one at the lock's path."""
        try:
            return file is not None and os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # the next operation fails, too, with a better message
            return True

    def _holder(self) -> str:
        """Return the description that the lock's holder has written to the file.

        The holder itself must not call this while the file exists: closing any handle of it would release the lock.
        """
        try:
            with self.path.open("rb") as file:
                text = file.read(1000).decode(errors="replace")
        except OSError:
            text = ""
        return "".join(c if c.isprintable() else "?" for c in text) or "another run"


def describe_this_process() -> str:
    """Return id, host, start time and command of this process, as part of a line."""
    command = shlex.join(sys.orig_argv)
    if len(command) > LONGEST_COMMAND:
        command = f"{command[:LONGEST_COMMAND]}.."
    printable = command.encode(errors="replace").decode()
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S} ({printable})"
