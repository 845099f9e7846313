"""Ending a run in good order when the cluster asks for it.

SIGTERM comes from schedulers and torchrun before they kill; SIGUSR1 is what `sbatch --signal=USR1@120` sends two
minutes before the time is up.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # of main.py; "try again later" (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """The run was asked to end, and all that it needs to go on is on the disk."""


def end_at_once(*_: object) -> None:
    """The handler for `SIGNALS` where there is nothing to finish."""
    raise Preempted


class StopRequest:
    """True once one of `SIGNALS` has arrived."""

    def __init__(self) -> None:
        self.arrived = False
        self.raises = False

    def __bool__(self) -> bool:
        return self.arrived

    def __call__(self, *_: object) -> None:
        self.arrived = True
        if self.raises:
            end_at_once()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a signal raises Preempted: for work that a resumed run repeats."""
        if self.arrived:
            end_at_once()
        self.raises = True
        try:
            yield
        finally:
            self.raises = False


@contextmanager
def noticing_signals() -> Iterator[StopRequest]:
    """Within the block `SIGNALS` go to the request that it yields, and end nothing by themselves."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For data-loading workers: clusters signal every process, but the step under way still needs its images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # runs before multiprocessing's own handler, which would wait for a SIGTERM to end the workers
def kill_workers() -> None:
    """Ends the processes that load data; what others would end them by, they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's own handler raises an error for dead workers
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
