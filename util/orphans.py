"""Ending of processes whose parent has ended without being able to end them.

This module needs nothing but Python itself, so that it can be set up before imports that take seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time


def end_with_launcher() -> None:
    """End this process soon after the launcher, if torchrun or torch.distributed.launch has started it.

    Otherwise, it would continue to train, next to the processes of a launcher that is started again. The end of any
    other parent means nothing: shells end before the processes that `nohup` or a scheduler keeps alive.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), "the launcher")


def end_with(parent: int, name: str) -> None:
    """End this process, as by SIGKILL, within about a second after its parent.

    Args:
        parent: the parent's process id.
        name: its name in the printed line; "" prints nothing.
    """
    threading.Thread(target=_watch, args=(parent, name), daemon=True).start()


def _watch(parent: int, name: str) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if name:
        with contextlib.suppress(OSError):  # the reader of the output may have been the launcher
            os.write(2, f"{name} (process {parent}) has ended, and so does process {os.getpid()}\n".encode())
    os._exit(1)
