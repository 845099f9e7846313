"""Requests to stop: signals from schedulers and torchrun, and Ctrl-C.

SIGTERM comes from schedulers and torchrun before they kill; SIGUSR1 is what `sbatch --signal=USR1@120` sends two
minutes before the time limit; SIGINT is Ctrl-C.

Python runs a signal's handler in the main thread, between two of its instructions. An exception that the handler raises
can therefore occur in any line, also in one that reads a file, where it must not be mistaken for an error of the file.
The main thread cannot run the handler while it waits in C++ code, for example for other processes. In this case, a
second thread handles the signal. This module needs only Python itself, so that it can be set up before slow imports.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has no SIGUSR1
EXIT_CODE = 75  # of main.py after SIGTERM or SIGUSR1: "try again later" (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C, as in shells
PATIENCE = 3  # seconds for a process to end by itself if it has nothing to finish
# Launchers forward a Ctrl-C that the terminal has already sent to the processes: ignore a second one this soon.
SAME_REQUEST = 2 if "RANK" in os.environ or "SLURM_PROCID" in os.environ else 0  # seconds


class Stopped(SystemExit):
    """Exception in a process that was asked to stop; `code` is its exit code.

    It does not derive from `Exception`, so that code that takes every `Exception` for a damaged file does not catch it.
    """

    code: int


class StopRequest:
    """The request to stop this process, which is true after a signal, and the handler of these signals.

    By default, a signal raises `Stopped` at once. Within `deferred`, it is only noted: the code there checks the truth
    value of this object where it can stop, and raises `Stopped` itself.
    """

    def __init__(self) -> None:
        self.exit_code = 0  # not 0 once a signal has arrived
        self.importing = False
        self.deferring = False
        self.raised = False  # any error that follows is then a consequence
        self.installed = False
        self.code_if_preempted: int | None = None

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def __call__(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        if self:
            if not self.installed and number == signal.SIGINT:  # otherwise, the thread does this
                raise Stopped(INTERRUPTED)
            return  # an exception that is being handled must not be replaced by another
        self.exit_code = self._code_after(number)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.deferring:
            _tell(f"stopped by {name}")
            if self.importing:  # modules written in C turn any exception into an ImportError
                os._exit(self.exit_code)
            self.raise_if_asked()
        _tell(f"{name}: finishing this step" + "; press it again to stop at once" * (number == signal.SIGINT))

    def install(self, code_if_preempted: int | None = None, importing: bool = False) -> None:
        """Handle signals until the end of this process, which a command line has started.

        Args:
            code_if_preempted: the exit code after SIGTERM and SIGUSR1, by default 128 plus the signal's number.
            importing: until the next call, a signal ends the process without an exception.
        """
        self.code_if_preempted = code_if_preempted
        self.importing = importing
        if self.installed:
            return
        self.installed = True
        received, sent = socket.socketpair()
        sent.setblocking(False)
        threading.Thread(target=self._watch, args=(received, sent), daemon=True).start()
        signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self)
        atexit.register(ignore_signals)  # at its end, Python restores the system's handlers, which kill it
        if hasattr(os, "register_at_fork"):  # otherwise, forked data-loading processes would inherit these
            os.register_at_fork(
                before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
                after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
                after_in_child=ignore_signals,
            )

    def raise_if_asked(self) -> None:
        """Raise `Stopped` if this process was asked to stop."""
        if self:
            self.raised = True
            raise Stopped(self.exit_code)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals within the block instead of raising anything.

        If no command line has called `install`, as in a notebook, signals are handled only within the block.
        """
        self.raise_if_asked()
        # Only the main thread may set handlers.
        here = not self.installed and threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self) for number in SIGNALS if here}
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
            for number, handler in before.items():
                signal.signal(number, handler)
            if not self.installed:
                self.exit_code, self.raised = 0, False  # the next run starts without a request

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` at once on a signal in this part of a `deferred` block; a resumed run repeats its work."""
        self.deferring = False
        self.raise_if_asked()
        yield
        self.deferring = True
        self.raise_if_asked()  # if the exception was lost: Python drops those raised in `__del__`, for example

    def _code_after(self, number: int) -> int:
        return self.code_if_preempted if self.code_if_preempted and number != signal.SIGINT else 128 + number

    def _watch(self, received: socket.socket, _sent: socket.socket) -> None:
        """Read the number of each signal in a thread, and end the process if the main thread does not."""
        interrupted = math.inf  # the time of the first Ctrl-C
        while True:
            number = received.recv(1)[0]
            if number not in SIGNALS:
                continue
            if time.monotonic() >= interrupted + SAME_REQUEST:
                _end_without_main_thread(INTERRUPTED)
            if number == signal.SIGINT:
                interrupted = min(interrupted, time.monotonic())
            if not self.deferring:
                timer = threading.Timer(PATIENCE, _end_without_main_thread, [self._code_after(number)])
                timer.daemon = True
                timer.start()


stop_request = StopRequest()  # one for the process, like signals


def end_now(code: int) -> None:
    """End this process and its data-loading processes, before a thread can report that these are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    kill_workers()
    os._exit(code)


def _end_without_main_thread(code: int) -> None:
    _tell("stopped at once")
    _kill_children()
    os._exit(code)


def ignore_signals() -> None:
    """Ignore signals: for data-loading processes, which also receive them, and for a process that is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers_at_exit() -> None:
    """Call `kill_workers` at exit, before multiprocessing's handler, which would send SIGTERM and wait in vain."""
    atexit.unregister(kill_workers)
    atexit.register(kill_workers)


def kill_workers() -> None:
    """Kill the data-loading processes, since they ignore other signals."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's own handler raises an error for dead workers
    _kill_children()


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _tell(line: str) -> None:
    """Print a line on the main process, not through Python's stream, to which the main thread may be writing."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with contextlib.suppress(OSError):  # the reader may be gone
            os.write(2, ("\n" * os.isatty(2) + line + "\n").encode())
