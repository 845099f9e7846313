"""Run main.py, which is sent a signal at a moment with a name.

Moments of a run, where N is the number of steps since its last start, and FILE is the name of a file that is written:

    before step N, after step N                          the optimizer's step
    halfway into FILE after step N, at the end of FILE after step N
    before FILE is in place after step N, after FILE is in place after step N
    before the log line after step N, after the log line after step N

As a script, for torchrun: KILLED_AT has an entry "rank: moment" for each start of the run, separated by "; ". The
process with this rank is killed at that moment; with KILLED_SIGNAL, torchrun is sent this signal instead. The ResNet is
narrow.
"""

import io
import itertools
import os
import pkgutil
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import main
import training
from tests.narrow import make_narrow

STRUCK = "struck "  # begins the line that announces a moment


class Strike:
    """A signal to a process, by default this one, at a moment of the run; `came` is True after it was sent."""

    def __init__(
        self, moment: str, number: int = signal.SIGKILL, process: int | None = None, announced: bool = False
    ) -> None:
        self.moment = moment
        self.announced = announced  # by a line on standard error
        self.number = number
        self.process = process or os.getpid()
        self.came = False
        self.steps = 0
        self.watch()

    def at(self, moment: str) -> None:
        if moment == self.moment and not self.came:
            self.came = True
            if self.announced:
                os.write(2, f"{STRUCK}{moment}\n".encode())
            os.kill(self.process, self.number)

    def watch(self) -> None:
        """Wrap the functions of a run, so that they call `at` at each moment."""
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


# Moments just before calls of functions: a function, and the numbers of these calls, counted from 1.
CALLS: dict[str, tuple[str, range]] = {
    "a file of weights is read": ("torch.load", range(1, 2)),
    "the first image is decoded": ("datasets.images._decode_jpeg", range(1, 2)),
    "the second image is decoded": ("datasets.images._decode_jpeg", range(2, 3)),
    "the first losses are computed": ("run.step.logged_losses", range(1, 2)),
    "the losses of the first and the second batch are computed": ("run.step.logged_losses", range(1, 3)),
    "the first evaluation is scored": ("engine.CocoEvaluator.accumulate", range(1, 2)),
    "the second evaluation is scored": ("engine.CocoEvaluator.accumulate", range(2, 3)),
    "the first line of the log is written": ("training.append_log", range(1, 2)),
    "the second line of the log is written": ("training.append_log", range(2, 3)),
    "the data is loaded": ("main.load_data", range(1, 2)),
    "the model is distributed": ("main.distribute", range(1, 2)),
    "the training begins": ("training.take_steps", range(1, 2)),
    "the evaluation begins": ("main.evaluate", range(1, 2)),
    "workers are ended after the run": ("main.kill_workers", range(1, 2)),
    "the process group is left after the run": ("main.leave_process_group", range(1, 2)),
}


def strike_at(moment: str, number: int, came: Path | None = None) -> None:
    """Send this process a signal at each call of a moment in `CALLS`, and write an empty file `came`."""
    place, chosen = CALLS[moment]
    owner_name, name = place.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)
    calls = itertools.count(1)

    def striking(*args, **kwargs):
        if next(calls) in chosen:
            if came:
                came.touch()
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, striking)


def run_struck(flags: list[str], moment: str, number: int, env: dict[str, str], printed: Path, narrow: bool) -> None:
    """Run main.py with these flags and a signal at a moment ("" for no signal); only for a new process.

    Its output is written to the files `printed`.out and .err; at the moment, it writes an empty file `printed`.came.
    """
    torch.set_num_threads(1)
    if narrow:
        make_narrow(pytest.MonkeyPatch())
    os.environ.update(env)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(printed.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), stream.fileno())
    if moment:
        strike_at(moment, number, printed.with_suffix(".came"))
    sys.argv = ["main.py", *flags]
    main.run()


def run(flags: list[str], moment: str, number: int) -> None:
    """Run main.py with these flags, a narrow ResNet and a signal at that moment; only for a new process."""
    torch.set_num_threads(1)
    make_narrow(pytest.MonkeyPatch())
    Strike(moment, number)
    sys.argv = ["main.py", *flags]
    with Path(os.devnull).open("w") as sys.stdout:
        main.run()


if __name__ == "__main__":
    strikes = [strike for strike in os.environ["KILLED_AT"].split("; ") if strike]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    make_narrow(pytest.MonkeyPatch())
    victim, _, moment = strikes[start].partition(": ") if start < len(strikes) else ("", "", "")
    if victim == os.environ["RANK"] and "KILLED_SIGNAL" in os.environ:
        Strike(moment, int(os.environ["KILLED_SIGNAL"]), os.getppid(), announced=True)
    elif victim == os.environ["RANK"]:
        Strike(moment, announced=True)
    main.run()
