"""Errors that the user can fix, and the line that says how."""

from __future__ import annotations

import re
import sys

# Messages of gloo, NCCL and their store about a process that is gone, and about one that does not answer.
GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (is )?closed|pair closure|remote process"
    r"|communicator was aborted|failed to recv|connectFullMesh",
    re.IGNORECASE,
)
SILENT = re.compile(r"time(d )?out", re.IGNORECASE)
LONGEST_REASON = 300  # characters


class InputError(ValueError):
    """Error for a flag, file, image or annotation that is not usable; the message says which, why and what to do.

    The command line prints the message as one line, without a stack trace.
    """

    @property
    def line(self) -> str:
        """Message alone, without the stack trace that precedes it in errors from data-loading workers."""
        return str(self).rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


def reason(error: BaseException) -> str:
    """Return the first line of another library's error message; the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 2]}.."  # some quote a file


def what_to_do(error: Exception) -> str:
    """Return a line about an error that the user can fix; "" for any other."""
    if isinstance(error, InputError):
        return error.line
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: lower --batch_size, --max_size or the size of the model ({reason(error)})"
    torch = sys.modules.get("torch")  # not imported here, which takes seconds; without it, none of these errors occurs
    if torch is None:
        return ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: lower --batch_size or --max_size ({reason(error)})"
    if is_lost_peer(error):
        if GONE.search(str(error)):
            return (
                "another process of this run has died or stopped; its own last line says why, and if there is none, "
                "the system has killed it, perhaps for lack of memory"
            )
        return "another process of this run has not answered in time: it hangs, or has much more to do than this one"
    if str(error).startswith("DataLoader worker"):
        return f"a process that loads data has died, perhaps for lack of memory: lower --num_workers ({reason(error)})"
    return ""


def is_lost_peer(error: Exception) -> bool:
    """Return whether an error says that another process of this run has ended or does not answer."""
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and distributed.is_available()):
        return False
    text = str(error)
    from_backend = isinstance(error, distributed.DistError) or "gloo" in text.lower()
    return from_backend and bool(GONE.search(text) or SILENT.search(text))
