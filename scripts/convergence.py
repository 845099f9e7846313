"""Compare how fast models learn, from the logs of runs with several seeds.

    python -m scripts.convergence --runs output/convergence

The tool reads DIR/MODEL/seed*/log.txt, draws AP over epochs into DIR/convergence.png and .svg, and writes two tables
into DIR/convergence.md: AP at equal epochs, and epochs until equal AP. `scripts/convergence.sh` makes such runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("convergence")

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models import MODEL_NAMES
from run.log_file import number_in, read_log
from util.command import run_command
from util.errors import InputError
from util.files import replacing
from util.text import counted

NAMES = MODEL_NAMES | {"group_detr": "Group DETR"}  # by the name of the folder
MOST_ROWS = 12  # in the table of AP at equal epochs


class Curve(NamedTuple):
    """AP on val of a model's runs with S seeds, after each of E epochs.

    epochs: [E], the epochs, counted from 1, in which all runs were evaluated.
    aps: [S, E], AP of each run after each epoch.
    """

    epochs: np.ndarray
    aps: np.ndarray

    def epochs_until(self, ap: float) -> list[float]:
        """Return the first epoch of each run with at least this AP; infinity if there is none."""
        return [min(self.epochs[run >= ap], default=np.inf) for run in self.aps]


def read_curves(runs: Path) -> dict[str, Curve]:
    """Return the curves of all models whose runs have been evaluated after a common epoch, sorted by folder name.

    Raises:
        InputError: if there is no such model.
    """
    curves = {}
    for folder in sorted({log.parent.parent for log in runs.glob("*/seed*/log.txt")}):
        aps = [read_aps(log) for log in sorted(folder.glob("seed*/log.txt"))]
        if common := sorted(set.intersection(*map(set, aps))):
            curves[folder.name] = Curve(np.array(common), np.array([[run[epoch] for epoch in common] for run in aps]))
    if not curves:
        raise InputError(f"--runs {runs}: no evaluated run in MODEL/seed*/log.txt; scripts/convergence.sh makes them")
    return curves


def read_aps(log: Path) -> dict[int, float]:
    """Return AP on val by epoch, counted from 1."""
    aps = {entry["epoch"] + 1: number_in(entry, "test_coco_eval_bbox", 0) for entry in read_log(log)}
    return {epoch: ap for epoch, ap in aps.items() if ap is not None}


def draw(curves: dict[str, Curve]) -> Figure:
    """Draw the mean AP of each model over epochs, and the range of its runs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (epochs, aps) in curves.items():
        label = f"{NAMES.get(name, name)}, {counted(len(aps), 'seed')}"
        (line,) = axes.plot(epochs, aps.mean(0), marker="o", markersize=4, label=label)
        axes.fill_between(epochs, aps.min(0), aps.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="epochs", ylabel="AP on val: mean and range")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def tables(curves: dict[str, Curve]) -> str:
    """Return both tables as Markdown; values are "mean (lowest to highest)" over the seeds."""
    names = [NAMES.get(name, name) for name in curves]
    common = sorted(set.intersection(*(set(curve.epochs.tolist()) for curve in curves.values())))
    shown = [common[i] for i in np.linspace(0, len(common) - 1, min(len(common), MOST_ROWS)).round().astype(int)]
    at_epochs = [
        [str(epoch), *(describe(curve.aps[:, curve.epochs == epoch].ravel()) for curve in curves.values())]
        for epoch in shown
    ]
    until_ap = []
    for name, curve in zip(names, curves.values(), strict=True):
        ap = curve.aps[:, -1].mean()
        reached = (describe_epochs(other.epochs_until(ap), other.epochs[-1]) for other in curves.values())
        until_ap.append([f"{ap:.3f}, {name} after {counted(int(curve.epochs[-1]), 'epoch')}", *reached])
    return "\n".join(
        [*markdown(["AP at epoch", *names], at_epochs), "", *markdown(["epochs until AP", *names], until_ap)]
    )


def describe(values: np.ndarray) -> str:
    """Return the mean and the range of values of AP."""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def describe_epochs(epochs: Sequence[float], last: int) -> str:
    """Return the range of the epochs in which runs reached an AP; infinity: not until the last epoch."""
    low, high = (f"more than {last}" if np.isinf(epoch) else str(int(epoch)) for epoch in (min(epochs), max(epochs)))
    return low if low == high else f"{low} to {high}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    runs = parse_flags("convergence", argv).runs
    curves = read_curves(runs)
    figure = draw(curves)
    for kind in ("png", "svg"):
        with replacing(runs / f"convergence.{kind}") as file:
            figure.savefig(file, format=kind, dpi=110)
    text = tables(curves)
    with replacing(runs / "convergence.md") as file:
        file.write(f"{text}\n".encode())
    print(f"{text}\nwrote {runs}/convergence.png, .svg and .md")


if __name__ == "__main__":
    run_command(main)
