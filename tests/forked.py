"""Processes that start quickly: they are forked from a process that has imported the modules that they need."""

import multiprocessing
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import killed
from tests.narrow import is_narrow

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.killed", "tests.two_processes"])
LONGEST = 200  # seconds


def run_main(
    flags: list[str], folder: Path, moment: str = "", number: int = 0, **env: str
) -> subprocess.CompletedProcess:
    """Run main.py in another process; its output is written to `folder`.

    If a moment of `killed.CALLS` is given, the process is sent the signal with this number at that moment. Its resnet18
    is narrow if that of this process is.
    """
    printed = folder / "printed"
    process = CONTEXT.Process(target=killed.run_struck, args=(flags, moment, number, env, printed, is_narrow()))
    process.start()
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
    out, err = (printed.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert process.exitcode is not None, f"not finished after {LONGEST} seconds:\n{out}{err}"
    assert not moment or printed.with_suffix(".came").exists(), f"{moment!r} never came:\n{out}{err}"
    return subprocess.CompletedProcess(flags, process.exitcode, out, err)


def run_on_several(function: Callable[..., Any], args: tuple, nprocs: int) -> None:
    """Call a function with the rank and `args` on `nprocs` processes."""
    started = torch.multiprocessing.start_processes(function, args, nprocs, join=False, start_method="forkserver")
    end = time.monotonic() + LONGEST
    while not started.join(max(0, end - time.monotonic())):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"not finished after {LONGEST} seconds")
