"""main.py, sent a signal at a moment with a name.

The moments of a run, N being the steps that this start of it has taken, and FILE what is written:

    before step N, after step N                          the optimizer's step
    halfway into FILE after step N, at the end of FILE after step N
    before FILE is in place after step N, after FILE is in place after step N
    before the log line after step N, after the log line after step N

As a script, for torchrun: KILLED_AT holds "process: moment" for each start of the run that is to be struck, with
"; " between them. With KILLED_SIGNAL, torchrun is sent that signal instead.
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


class Strike:
    """A signal to a process (this one) at a moment of the run; `came` says whether it was sent."""

    def __init__(self, moment: str, number: int = signal.SIGKILL, process: int | None = None) -> None:
        self.moment = moment
        self.number = number
        self.process = process or os.getpid()
        self.came = False
        self.steps = 0
        self.watch()

    def at(self, moment: str) -> None:
        if moment == self.moment and not self.came:
            self.came = True
            os.kill(self.process, self.number)

    def watch(self) -> None:
        """Have the functions that a run consists of tell their moments."""
        step, save, replace, append_log = torch.optim.AdamW.step, torch.save, Path.replace, training.append_log

        def step_between(*args, **kwargs):
            self.steps += 1
            self.at(f"before step {self.steps}")
            result = step(*args, **kwargs)
            self.at(f"after step {self.steps}")
            return result

        def save_in_two_parts(contents: object, file) -> None:
            name = Path(file.name).name.removeprefix(".").rsplit(".", 2)[0]  # of a temporary file
            whole = io.BytesIO()
            save(contents, whole)
            data = whole.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            self.at(f"halfway into {name} after step {self.steps}")
            file.write(data[len(data) // 2 :])
            self.at(f"at the end of {name} after step {self.steps}")

        def replace_between(path: Path, target: Path) -> Path:
            name = Path(target).name
            self.at(f"before {name} is in place after step {self.steps}")
            result = replace(path, target)
            self.at(f"after {name} is in place after step {self.steps}")
            return result

        def append_between(*args) -> None:
            self.at(f"before the log line after step {self.steps}")
            append_log(*args)
            self.at(f"after the log line after step {self.steps}")

        torch.optim.AdamW.step, torch.save, Path.replace = step_between, save_in_two_parts, replace_between
        training.append_log = append_between


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


def run(flags: list[str], moment: str, number: int) -> None:
    """Run main.py with these flags, sent a signal at that moment; for a fresh process."""
    torch.set_num_threads(1)
    Strike(moment, number)
    sys.argv = ["main.py", *flags]
    with Path(os.devnull).open("w") as sys.stdout:
        main.run()


if __name__ == "__main__":
    strikes = [strike for strike in os.environ["KILLED_AT"].split("; ") if strike]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    victim, _, moment = strikes[start].partition(": ") if start < len(strikes) else ("", "", "")
    if victim == os.environ["RANK"] and "KILLED_SIGNAL" in os.environ:
        Strike(moment, int(os.environ["KILLED_SIGNAL"]), os.getppid())
    elif victim == os.environ["RANK"]:
        Strike(moment)
    main.run()
