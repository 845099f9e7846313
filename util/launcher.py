"""The environment variables that launchers set: torchrun, torch.distributed.launch and srun.

This module needs only Python itself, so that flags can be read before imports that take seconds.
"""

from __future__ import annotations

import os

from util.errors import InputError

LARGEST = 10**6
ADVICE = "torchrun and srun set it; to run without them, unset it"


def text(name: str) -> str:
    """Return the text of a variable. Raise InputError if it is not set."""
    if name not in os.environ:
        raise InputError(
            f"the environment variable {name} is not set, but others of a launcher are: start with torchrun or srun, "
            "or set it as well"
        )
    return os.environ[name]


def number(name: str, default: int | None = None, least: int = 0, most: int = LARGEST) -> int:
    """Return the number in a variable, or the default if it is not set.

    Raises:
        InputError: if it is not an integer within the limits, or not set and there is no default.
    """
    if default is not None and name not in os.environ:
        return default
    written = text(name)
    try:
        value = int(written)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise InputError(
            f"the environment variable {name} is {short(written)}: must be an integer between {least} and {most}; "
            f"{ADVICE}"
        )
    return value


def rank_and_size(rank: str, size: str) -> tuple[int, int]:
    """Return this process's rank and the number of processes, from the variables named `rank` and `size`.

    Raises:
        InputError: if a variable is not a number, or the rank is not below the number of processes.
    """
    own, count = number(rank), number(size, least=1)
    if own >= count:
        raise InputError(
            f"the environment variable {rank} is {own}: must be below {size}, which is {count}, since processes are "
            f"counted from 0; {ADVICE}"
        )
    return own, count


def short(value: str) -> str:
    """Return the text of a variable as part of a line."""
    return ascii(value) if len(value) <= 40 else f"{value[:38]!a}.."
