"""main.py, sent a signal at a chosen moment: in a file, between two renames, around a step, before a function's call.

As a script, for torchrun: KILLED_AT holds "process:moment" for each start of the run that is to be struck, with commas
between them. With KILLED_SIGNAL, torchrun is sent that signal instead.
"""

import io
import itertools
import os
import pkgutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import main
import training
from util import files


def kill_at(moment: int, number: int = signal.SIGKILL, process: int | None = None) -> None:
    """Arranges that a process (this one) is sent a signal at the `moment`th moment that might matter; 0: never."""
    left = moment

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(process or os.getpid(), number)

    def around(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def ticking(*args, **kwargs):
            tick()
            result = original(*args, **kwargs)
            tick()
            return result

        setattr(owner, name, ticking)

    save = torch.save

    def save_in_two_parts(obj: object, file) -> None:
        whole = io.BytesIO()
        save(obj, whole)
        data = whole.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        tick()
        file.write(data[len(data) // 2 :])

    torch.save = save_in_two_parts
    around(torch.optim.AdamW, "step")
    around(files.os, "fsync")
    around(Path, "replace")
    around(training, "append_log")


def strike_at(place: str, signals: dict[int, int]) -> None:
    """Send this process a signal just before a call of the function `place`, from within the code that calls it.

    Args:
        signals: by the number of the call, from 1.
    """
    owner_name, name = place.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)
    calls = itertools.count(1)

    def striking(*args, **kwargs):
        if number := signals.get(next(calls)):
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, striking)


def run_struck(flags: list[str], place: str, signals: dict[int, int], env: dict[str, str], printed: Path) -> None:
    """Run main.py with these flags and signals, printing to the files `printed`.out and .err; for a fresh process."""
    torch.set_num_threads(1)
    os.environ.update(env)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(printed.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), stream.fileno())
    strike_at(place, signals)
    sys.argv = ["main.py", *flags]
    main.run()


def run(flags: list[str], moment: int, number: int) -> None:
    """In a process of its own: main.py with these flags, sent a signal at that moment."""
    torch.set_num_threads(1)
    kill_at(moment, number)
    sys.argv = ["main.py", *flags]
    with Path(os.devnull).open("w") as sys.stdout:
        main.run()


if __name__ == "__main__":
    strikes = os.environ["KILLED_AT"].split(",")
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    victim, moment = strikes[start].split(":") if start < len(strikes) else ("", "0")
    if victim == os.environ["RANK"] and "KILLED_SIGNAL" in os.environ:
        kill_at(int(moment), int(os.environ["KILLED_SIGNAL"]), os.getppid())
    elif victim == os.environ["RANK"]:
        kill_at(int(moment))
    main.run()
