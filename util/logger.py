"""Output of a run for its user: coloured lines, running averages, a progress bar on terminals."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from datetime import timedelta
from statistics import median
from typing import Any, Protocol

import torch
from termcolor import colored
from torch import Tensor
from tqdm import tqdm

from util.distributed import get_world_size, is_main_process, reduce_dict
from util.text import printable


def log(message: str = "", color: str | None = None) -> None:
    """Print lines on the main process only, without control characters; coloured if standard output is a terminal."""
    if is_main_process():
        message = "\n".join(map(printable, message.split("\n")))
        tqdm.write(colored(message, color) if color else message, file=sys.stdout)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print a warning that the user should not overlook."""
    log(printable(f"warning: {message}"), "yellow")


class SmoothedValue:
    """Series of numbers: the latest one, the median and mean of the last `window_size`, and the mean of all."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.window: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def state_dict(self) -> dict[str, Any]:
        return {"window": list(self.window), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = deque(state["window"], maxlen=self.window.maxlen)
        self.total, self.count = state["total"], state["count"]

    def update(self, value: float, n: int = 1) -> None:
        self.window.append(value)
        self.total += value * n
        self.count += n

    @property
    def value(self) -> float:
        return self.window[-1]

    @property
    def median(self) -> float:
        return median(self.window)

    @property
    def avg(self) -> float:
        return sum(self.window) / len(self.window)

    @property
    def max(self) -> float:
        return max(self.window)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        if not self.window:
            return "-"
        return self.fmt.format(
            value=self.value, median=self.median, avg=self.avg, max=self.max, global_avg=self.global_avg
        )


def is_shown(name: str) -> bool:
    """Return whether a scalar is shown to users; per-layer and unweighted losses are only averaged."""
    return not re.search(r"_(\d+|unscaled)$", name)


class SizedIterable(Protocol):
    """Iterable of known length, such as a DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator: ...


class MetricLogger:
    """Running averages of named scalars and the lines that show them.

    Scalars may be tensors: they stay on the device until a line is printed or an average is needed, and are then
    fetched together, so that a training step never waits for its logging.
    """

    def __init__(self, delimiter: str = "  ") -> None:
        self.delimiter = delimiter
        self._meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self._pending: list[tuple[float | Tensor, dict[str, float | Tensor]]] = []

    @property
    def meters(self) -> dict[str, SmoothedValue]:
        self._fetch()
        return self._meters

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self._meters[name] = meter

    def state_dict(self) -> dict[str, Any]:
        """Return the averages so far, as plain data."""
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, meter in state.items():
            self._meters[name].load_state_dict(meter)

    def update(self, leave_out: float | Tensor = 0.0, **values: float | Tensor) -> None:
        """Add a value to each average, unless `leave_out` is not 0."""
        values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}
        self._pending.append((leave_out, values))

    def _fetch(self) -> None:
        pending, self._pending = self._pending, []
        rows = [[leave_out, *values.values()] for leave_out, values in pending]
        tensors = [v for row in rows for v in row if isinstance(v, Tensor)]
        fetched = iter(torch.stack(tensors).tolist() if tensors else [])
        for row, (_, names) in zip(rows, pending, strict=True):
            leave_out, *values = (next(fetched) if isinstance(v, Tensor) else v for v in row)
            if not leave_out:
                for name, value in zip(names, values, strict=True):
                    self._meters[name].update(value)

    def synchronize_between_processes(self) -> None:
        """Make `global_avg` the mean over the steps of all processes."""
        if get_world_size() == 1:
            return
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        sums = {
            name: torch.tensor([meter.total, meter.count], dtype=torch.float64, device=device)
            for name, meter in self.meters.items()
        }
        for name, total_and_count in reduce_dict(sums, average=False).items():
            total, count = total_and_count.tolist()
            self._meters[name].total, self._meters[name].count = total, int(count)

    def averages(self) -> dict[str, float]:
        """Return the mean of every scalar over all steps."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def shown(self) -> dict[str, SmoothedValue]:
        """Return the meters that are shown to users."""
        return {name: meter for name, meter in self.meters.items() if is_shown(name)}

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.shown().items())

    def log_every(
        self, iterable: SizedIterable, print_freq: int, header: str = "", start: int = 0, later: int = 0
    ) -> Iterator:
        """Yield from `iterable` and show averages, times and memory every `print_freq` items.

        They are a progress bar on a terminal, otherwise plain lines. Both give the remaining time of the epoch and, if
        `later` items follow in later epochs, of the run. If an interrupted epoch is resumed after `start` items, the
        iterable yields only the remaining ones, but its length counts all.
        """
        steps = len(iterable)
        on_terminal = sys.stdout.isatty()
        bar = tqdm(
            total=steps,
            initial=start,
            desc=header,
            file=sys.stdout,
            disable=not (on_terminal and is_main_process()),
            bar_format="{desc} {bar:12} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]{postfix}",
        )
        step_time, data_time = SmoothedValue(fmt="{avg:.3f}"), SmoothedValue(fmt="{avg:.3f}")
        begin = end = time.time()
        for step, item in enumerate(iterable, start):
            data_time.update(time.time() - end)
            yield item
            step_time.update(time.time() - end)
            end = time.time()
            bar.update()
            if step % print_freq == 0 or step == steps - 1:
                memory = f"{peak_memory_mib():.0f} MiB"
                eta, run_eta = (
                    timedelta(seconds=int(step_time.global_avg * (steps - step - 1 + more))) for more in (0, later)
                )
                of_run = f" (run {run_eta})" if later else ""
                if on_terminal:
                    averages = " ".join(f"{k} {m.median:.3g}" for k, m in self.shown().items() if m.window)
                    bar.set_postfix_str(f"{averages} {memory}{of_run}")
                else:
                    place = f"[{step:>{len(str(steps))}}/{steps}]"
                    times = f"time: {step_time}  data: {data_time}  max mem: {memory}"
                    parts = (header, place, f"eta: {eta}{of_run}", str(self), times)
                    log(self.delimiter.join(part for part in parts if part))
        bar.close()
        total = time.time() - begin
        log(f"{header} total time: {timedelta(seconds=int(total))} ({total / max(steps - start, 1):.4f} s / it)")


def peak_memory_mib() -> float:
    """Return the peak memory so far, in MiB: of the GPU if one is in use, else of this process (NaN on Windows)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
