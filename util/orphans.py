"""Ending of processes whose parent has ended without stopping them.

This module needs only Python itself, so that it can be set up before imports that take seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time


def end_with_launcher() -> None:
    """End this process soon after the launcher, if torchrun or torch.distributed.launch has started it.

    Otherwise, it would continue to train while a restarted launcher trains with new processes. The end of any other
    parent is ignored: a shell may end before the processes that `nohup` or a scheduler keeps alive.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), "the launcher")


def end_with(parent: int, name: str) -> None:
    """End this process without clean-up, as by SIGKILL, within about a second after its parent has ended.

    Args:
        parent: the parent's process id.
        name: the parent's name in the printed line; "" prints nothing.
    """
    threading.Thread(target=_watch, args=(parent, name), daemon=True).start()


def _watch(parent: int, name: str) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if name:
        with contextlib.suppress(OSError):  # the reader of the output may have been the launcher
            os.write(2, f"{name} (process {parent}) has ended; process {os.getpid()} ends, too\n".encode())
    os._exit(1)
