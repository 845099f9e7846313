"""Common parts of all command lines: errors of flags, exit codes, and optional libraries."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from util.errors import InputError, what_to_do
from util.preemption import stop_request
from util.text import printable


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Formatter of help texts that adds the defaults of flags, except of switches and of flags that are unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.nargs == 0 or action.default in (None, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Argument parser with defaults in the help text, whose errors take one line."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, as argparse does."""
        self.exit(2, f"{error_line(message)}; --help lists the flags\n")


def answer_early(check: Callable[[argparse.Namespace], Any]) -> None:
    """Answer --help and refuse wrong flags before a program's imports, which take seconds.

    `check` parses the command line into a namespace that already holds a device, whose default would import torch.
    """
    replace_unprintable_characters()
    try:
        check(argparse.Namespace(device="cpu"))
    except InputError as error:
        sys.exit(error_line(str(error)))


def run_command(main: Callable[[], Any]) -> None:
    """Run a tool and exit with the status that it returns (None: 0).

    A user's mistake ends in one line and exit code 1, Ctrl-C in one line and 130, SIGTERM in one line and 143.
    """
    replace_unprintable_characters()
    ignore_image_warnings()
    stop_request.install()
    try:
        status = main()
    except Exception as error:
        if stop_request.raised:  # C++ code may have turned `Stopped` into another error
            stop_request.raise_if_asked()
        if not (line := what_to_do(error)):
            raise
        status = error_line(line)
    sys.exit(status)


def replace_unprintable_characters() -> None:
    """Make standard output and error replace characters that their encoding lacks instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in notebooks and tests it may be another object
            stream.reconfigure(errors="replace")


def ignore_image_warnings() -> None:
    """Ignore Pillow's warnings about the metadata of images, which do not prevent their use, in this process.

    The filter is global, so it applies to all threads: only command lines and the processes they start may set it.
    """
    warnings.filterwarnings("ignore", module="PIL")


def error_line(message: str) -> str:
    """Return an error message as one line without control characters; "error:" is red on a terminal."""
    from termcolor import colored  # which the hub entries do not need

    return colored("error: ", "red", no_color=not sys.stderr.isatty()) + printable(message)


def need(module: str, packages: str, purpose: str) -> ModuleType:
    """Return a module of an optional library.

    Args:
        module: its name, as for `import`.
        packages: its packages, as for `pip install`.
        purpose: the feature that needs it; the error begins with this.

    Raise InputError if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {packages}: pip install {packages} (all extras: pip install -r requirements-extras.txt)"
        ) from error
