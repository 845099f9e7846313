"""log.txt: one line of JSON per epoch; interruptions of a run neither repeat nor lose a line.

A log may also come from elsewhere, or be damaged: readers skip lines that they cannot use.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from util.distributed import is_main_process
from util.errors import InputError, reason
from util.files import check_folder, replacing, special_file
from util.logger import warn
from util.text import counted

# Metrics by which models are compared, with their places (key, index) in an entry; the first that an entry has counts.
SCORES: dict[str, tuple[str, int | str]] = {
    "PQ": ("test_PQ_all", "pq"),
    "mask AP": ("test_coco_eval_masks", 0),
    "AP": ("test_coco_eval_bbox", 0),
}
LONGEST_LINE = 2**20  # bytes; an epoch takes a few thousand


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a log file in order, without lines that are not entries.

    The list is empty if the file is missing, or is not a regular file.
    """
    return [entry for _, entry in _lines(Path(path)) if entry]


def number_in(entry: dict[str, Any], key: str, index: int | str | None = None) -> float | None:
    """Return the number at `entry[key]`, or at `entry[key][index]` with an index; None if there is no number."""
    value = entry.get(key)
    if isinstance(index, int):
        value = value[index] if isinstance(value, list) and len(value) > index else None
    elif index is not None:
        value = value.get(index) if isinstance(value, dict) else None
    return value if isinstance(value, float) or (type(value) is int and abs(value) < 2**63) else None


class Score(NamedTuple):
    """Result of an evaluation on val, by which models are compared: a metric of `SCORES`, its value and the epoch."""

    metric: str
    value: float
    epoch: int


def score_of(entry: dict[str, Any]) -> Score | None:
    """Return the score in the entry of an epoch; None without an evaluation, or if val has no objects (-1)."""
    for metric, place in SCORES.items():
        value = number_in(entry, *place)
        if value is not None:
            return Score(metric, value, entry["epoch"]) if math.isfinite(value) and value >= 0 else None
    return None


def logged_scores(path: str | Path) -> list[Score]:
    """Return the scores in a log file, in order."""
    return [score for score in map(score_of, read_log(path)) if score]


def best_score(path: str | Path) -> Score | None:
    """Return the highest score in a log file, the first of equal ones; None if there is none."""
    return max(logged_scores(path), key=lambda score: score.value, default=None)


def append_log(path: str | Path, entry: dict[str, Any]) -> None:
    """Append an entry to a log file, on the main process only."""
    if not is_main_process():
        return
    check_folder(Path(path))
    try:
        with open(path, "a", encoding="utf-8", opener=_without_waiting) as file:
            file.write(json.dumps({key: _without_nan(value) for key, value in entry.items()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)}); --resume auto continues from here") from error


def trim_log(path: str | Path, epoch: int) -> None:
    """Remove the entries of `epoch` and later, which will be trained again, and lines that are not entries.

    Anything other than a regular file, such as a named pipe, is replaced by an empty log.
    """
    path = Path(path)
    if not is_main_process() or not path.exists():
        return
    if kind := special_file(path):
        warn(f"{path}: is {kind}, not a file; a new log takes its place")
    lines = list(_lines(path))
    kept = [line for line, entry in lines if entry and entry["epoch"] < epoch]
    later = sum(entry is not None and entry["epoch"] >= epoch for _, entry in lines)
    others = len(lines) - len(kept) - later
    dropped = [f"{counted(later, 'line')} of epoch {epoch} and later"] * bool(later)
    dropped += [f"{counted(others, 'line')} without the numbers of an epoch"] * bool(others)
    if dropped:
        warn(f"{path}: dropped {' and '.join(dropped)}")
    trimmed = b"".join(kept)
    if kind or dropped or path.stat().st_size != len(trimmed):
        with replacing(path) as file:
            file.write(trimmed)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of a log that is not blank, with a line feed at its end, and its entry (None if it has none)."""
    if not path.exists() or special_file(path):
        return
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                is_whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
                while not is_whole:
                    rest = file.readline(LONGEST_LINE)
                    is_whole = rest.endswith(b"\n") or len(rest) < LONGEST_LINE
                if line := line.strip():
                    yield line + b"\n", _parse(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def _without_nan(value: Any) -> Any:
    """Return a value of an entry with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, list):
        return list(map(_without_nan, value))
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("epoch")) is not int:
        return None
    return entry if 0 <= entry["epoch"] < 2**31 else None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; raise OSError for a named pipe without a reader, instead of waiting for one."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
