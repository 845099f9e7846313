"""Draw the loss and AP curves of runs, also while they train.

    python -m scripts.plot_logs output/first output/second detr_resnet50 --output curves

A run is given by its folder, also a folder of the published code; by a log file or its URL; or by the name of one of
DETR's hub entries, for its published log. The pictures are curves.png and curves.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("plot_logs")

from collections.abc import Sequence
from itertools import count, cycle
from typing import Any
from urllib.parse import urlsplit

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from checkpoints.downloads import local_path
from checkpoints.published import LOGS
from run.log_file import number_in, read_log
from util.command import run_command
from util.errors import InputError
from util.files import check_is_file, replacing

Log = list[dict[str, Any]]

LEGEND_COLUMNS = 3
COLOURS = [mpl.colors.to_rgb(mpl.colormaps["tab10"](i)) for i in range(10)]
TRAIN: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "markersize": 3}
VAL: dict[str, Any] = {"linestyle": "-", "linewidth": 1.6, "markersize": 3, "marker": "o"}
MOST_MARKERS = 60  # in runs with more epochs, points are not marked
# Smallest range of an axis, so that noise looks like noise: a tenth of AP's range, and a tenth of the largest loss.
MIN_AP_RANGE = 0.1
MIN_LOSS_RANGE = 0.1


def plot_logs(runs: Sequence[str | Path], output: Path) -> list[Path]:
    """Draw the logs of runs into OUTPUT.png and OUTPUT.svg, and return their paths.

    Args:
        runs: folders of runs, log files, their URLs, or names in `checkpoints.published.LOGS`.
        output: the path of the pictures.

    Raises:
        InputError: if a run has no log or no finished epoch, or nothing can be written.
    """
    logs = dict(find_log(str(run)) for run in runs)
    figure = draw({distinct_name(path, list(logs)): read_run(log) for path, log in logs.items()})
    stem = output.stem if output.suffix in (".png", ".svg") else output.name
    paths = [output.with_name(f"{stem}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=110)
    return paths


def find_log(run: str) -> tuple[Path, Path]:
    """Return a path that names a run by its last part, and the path of the run's log."""
    if run in LOGS and not Path(run).exists():
        return Path(f"{run}, published"), local_path(LOGS[run])
    path = local_path(run)
    if path.is_file():
        return Path(urlsplit(run).path) if "://" in run else path.resolve(), path
    return path.resolve(), path / "log.txt"


def read_run(path: Path) -> Log:
    """Return the entries of a log that have the losses of an epoch.

    Raises:
        InputError: if there is no log, or it has no such entry.
    """
    check_is_file(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such file; name the --output_dir of a run, a log file, or one of {', '.join(LOGS)}"
        )
    if not (log := [entry for entry in read_log(path) if "train_loss" in entry]):
        raise InputError(f"{path}: it has no finished epoch yet; try again after the first epoch")
    return log


def distinct_name(run: Path, runs: Sequence[Path]) -> str:
    """Return the last part of a path, preceded by as many parent folders as distinguish it from the other paths."""

    def tail(path: Path, length: int) -> str:
        return "/".join(path.parts[-length:])

    others = [other for other in runs if other != run]
    return next(tail(run, n) for n in count(1) if tail(run, n) not in [tail(other, n) for other in others])


def points(log: Log, key: str, index: int | None = None) -> tuple[list[int], list[float]]:
    """Return the epochs, counted from 1, that have a value under `key` (and `index`), and these values."""
    values = [(entry["epoch"] + 1, number_in(entry, key, index)) for entry in log]
    known = [(epoch, value) for epoch, value in values if value is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def draw(logs: dict[str, Log]) -> Figure:
    """Draw a page with losses and AP of runs, by name; for a single run, also AP50, and AP and AP50 of masks."""
    single = len(logs) == 1
    figure = Figure(figsize=(9, 3.4 if single else 3.4 + 0.25 * -(-len(logs) // LEGEND_COLUMNS)), layout="constrained")
    loss, precision = figure.subplots(1, 2)
    colours = dict(zip(logs, cycle(COLOURS), strict=False))
    for name, log in logs.items():
        dot = "o" if len(log) == 1 else ""  # one point makes no line
        val = VAL | {"marker": "o" if len(log) <= MOST_MARKERS else ""}
        loss.plot(*points(log, "train_loss"), color=colours[name], marker=dot, **TRAIN)
        loss.plot(*points(log, "test_loss"), color=colours[name], **val)
        precision.plot(*points(log, "test_coco_eval_bbox", 0), color=colours[name], label="AP", **val)
        if single:
            more = {"AP50": ("test_coco_eval_bbox", 1)}
            if any("test_coco_eval_masks" in entry for entry in log):
                more |= {"mask AP": ("test_coco_eval_masks", 0), "mask AP50": ("test_coco_eval_masks", 1)}
            for colour, (label, place) in zip(COLOURS[1:], more.items(), strict=False):
                precision.plot(*points(log, *place), color=colour, label=label, **val)
    loss.set(xlabel="epoch", title="Loss", ylim=widened(*loss.get_ylim()))
    precision.set(xlabel="epoch", title="Average precision on val" if single else "AP on val")
    precision.set_ylim(0, max(precision.get_ylim()[1], MIN_AP_RANGE))
    for axes in (loss, precision):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    add_legends(figure, colours)
    if not any(points(log, "test_coco_eval_bbox", 0)[0] for log in logs.values()):
        precision.clear()
        precision.text(0.5, 0.5, "no evaluation yet", ha="center", color="0.4")
        precision.set_axis_off()
    return figure


def widened(low: float, high: float) -> tuple[float, float]:
    """Return the limits of the loss axis; if needed, widen its range to `MIN_LOSS_RANGE` of the larger limit."""
    missing = MIN_LOSS_RANGE * max(abs(low), abs(high)) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def add_legends(figure: Figure, colours: dict[str, tuple[float, float, float]]) -> None:
    """Add the name of a single run above its curves, or the names of several runs below them, and the line styles."""
    loss, precision = figure.axes
    if len(colours) == 1:
        figure.suptitle(*colours, fontsize=11, parse_math=False)
        precision.legend()
    else:
        runs = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
        legend = figure.legend(handles=runs, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a folder's name may hold dollar signs
    colour = COLOURS[0] if len(colours) == 1 else "0.3"
    styles = {"train": TRAIN, "val": VAL}
    loss.legend(handles=[Line2D([], [], color=colour, label=name, **style) for name, style in styles.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parse_flags("plot_logs", argv)
    for path in plot_logs(flags.runs, flags.output):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
