"""log.txt: one line of JSON an epoch, none twice and none missing, however often a run is interrupted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from util.distributed import is_main_process
from util.errors import InputError, reason
from util.files import replacing
from util.logger import warn


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log file; lines that are not whole, as a full disk leaves them, are passed over."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [entry for entry in map(_parse, lines) if entry]


def best_ap(path: str | Path) -> float:
    """The highest AP on val in a log file; minus infinity where nothing was evaluated."""
    return max((entry["test_coco_eval_bbox"][0] for entry in read_log(path) if "test_loss" in entry), default=-math.inf)


def append_log(path: str | Path, entry: dict[str, Any]) -> None:
    """Adds an entry, on the main process only."""
    if not is_main_process():
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)}); --resume auto goes on from here") from error


def trim_log(path: str | Path, epoch: int) -> None:
    """Drops what is not a whole line, and entries of `epoch` and later ones, which are about to be trained again."""
    path = Path(path)
    if not is_main_process() or not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    kept = [line for line in lines if (entry := _parse(line)) and entry["epoch"] < epoch]
    if len(kept) < len(lines):
        warn(f"{path}: {len(lines) - len(kept)} lines of epoch {epoch} and later are dropped")
    if text != (trimmed := "".join(f"{line}\n" for line in kept)):
        with replacing(path) as file:
            file.write(trimmed.encode())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("epoch"), int) else None
