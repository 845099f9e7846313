"""log.txt with any content: entries of epochs are used, and other lines stop neither a run nor a plot."""

import json
import os

import numpy as np
import pytest

from run.log_file import append_log, best_score, logged_scores, read_log, trim_log
from scripts.plot_logs import plot_logs
from util.errors import InputError

GOOD = [{"epoch": n, "train_loss": 2.0 - n, "test_coco_eval_bbox": [n / 10] * 12} for n in range(3)]
NO_ENTRIES = {
    "invalid byte": b'{"epoch": 1, "train_loss": 1.\xff}',
    "binary": bytes(range(128, 256)),
    "zeros": bytes(4096),
    "half": b'{"epoch": 1, "train_l',
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "text": b'"epoch"',
    "no epoch": b'{"train_loss": 1.0}',
    "text as epoch": b'{"epoch": "1", "train_loss": 1.0}',
    "list as epoch": b'{"epoch": [1], "train_loss": 1.0}',
    "true as epoch": b'{"epoch": true, "train_loss": 1.0}',
    "nan as epoch": b'{"epoch": NaN, "train_loss": 1.0}',
    "negative epoch": b'{"epoch": -1, "train_loss": 1.0}',
    "huge epoch": b'{"epoch": 1%s, "train_loss": 1.0}' % (b"0" * 400),
    "more digits than Python reads": b'{"epoch": 1%s}' % (b"0" * 10_000),
    "deeply nested": b'{"epoch": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge line": b'{"epoch": 1, "x": "' + b"x" * 3 * 2**20 + b'"}',
    "huge line of braces": b"{" * (2**21 + 7),
}
ODD_ENTRIES = {
    "other values": {"train_loss": "low", "test_coco_eval_bbox": "high", "test_loss": None},
    "nested values": {"train_loss": [1], "test_coco_eval_bbox": [[1]] * 12, "test_loss": {}},
    "true": {"train_loss": True, "test_coco_eval_bbox": [True] * 12},
    "short list": {"train_loss": 1.0, "test_loss": 1, "test_coco_eval_bbox": []},
    "nan": {"train_loss": float("nan"), "test_coco_eval_bbox": [float("nan")] * 12},
    "infinite": {"train_loss": float("inf"), "test_coco_eval_bbox": [float("inf")] * 12},
    "huge": {"train_loss": 10**400, "test_coco_eval_bbox": [10**400] * 12},
}


def write(path, *lines: bytes) -> None:
    first, *others = (json.dumps(entry).encode() for entry in GOOD)
    path.write_bytes(b"\n".join((first, *lines, *others)) + b"\n")


@pytest.mark.parametrize("line", NO_ENTRIES.values(), ids=NO_ENTRIES)
def test_lines_that_are_no_entries_are_dropped(line, tmp_path, capsys):
    log = tmp_path / "log.txt"
    write(log, line)
    assert read_log(log) == GOOD
    assert best_score(log).value == max(score.value for score in logged_scores(log)) == 0.2
    trim_log(log, 3)
    assert capsys.readouterr().out == f"warning: {log}: dropped 1 line without the numbers of an epoch\n"
    assert [json.loads(line) for line in log.read_text().splitlines()] == GOOD
    trim_log(log, 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("values", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
def test_entries_with_odd_values_have_no_score(values, tmp_path, capsys):
    log = tmp_path / "log.txt"
    write(log, json.dumps({"epoch": 7} | values).encode())
    assert [entry["epoch"] for entry in read_log(log)] == [0, 7, 1, 2]
    assert best_score(log).value == max(score.value for score in logged_scores(log)) == 0.2
    with np.errstate(all="raise"):
        plot_logs([tmp_path], tmp_path / "curves")
    trim_log(log, 3)
    assert "dropped 1 line of epoch 3 and later\n" in capsys.readouterr().out


def test_other_line_endings_are_read(tmp_path, capsys):
    """A byte-order mark, line endings of Windows, blank lines, and a last line without an ending."""
    log = tmp_path / "log.txt"
    lines = [json.dumps(entry).encode() for entry in GOOD]
    log.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert read_log(log) == GOOD
    trim_log(log, 3)
    assert capsys.readouterr().out == ""
    append_log(log, {"epoch": 3})
    assert [entry["epoch"] for entry in read_log(log)] == [0, 1, 2, 3]
    assert log.read_bytes().count(b"\n") == 4


def test_named_pipes_are_not_opened(tmp_path):
    """Opening one would wait for another program that opens it."""
    log = tmp_path / "log.txt"
    os.mkfifo(log)
    assert read_log(log) == []
    with pytest.raises(InputError, match=r"log.txt: is a named pipe, not a file"):
        plot_logs([tmp_path], tmp_path / "curves")
    with pytest.raises(InputError, match=r"log.txt: cannot be written .*--resume auto continues from here"):
        append_log(log, {"epoch": 0})
    trim_log(log, 0)
    append_log(log, {"epoch": 0})
    assert read_log(log) == [{"epoch": 0}]
