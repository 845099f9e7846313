"""Text from files reaches terminals, pictures and pages without control characters."""

import pytest
from PIL import Image

from datasets.classes import Classes
from evaluation.pictures import annotate, side_by_side
from scripts import plot_logs
from util.command import error_line
from util.logger import log, warn
from util.text import counted, printable

HOSTILE = "cat\x1b[2J\r\n\0\u202ereverse $x_{$"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("größe 猫 👩\u200d🚀", "größe 猫 👩\u200d🚀"),
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
        ("\u202eabc\ud800\u2028", r"\u202eabc\ud800\u2028"),
    ],
)
def test_printable_escapes_control_characters(text, expected):
    assert printable(text) == expected


def test_lines_on_the_terminal_are_printable(capsys):
    warn(HOSTILE)
    log(f"one\ntwo {HOSTILE}")
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert len(printed.splitlines()) == 4  # one of the warning; the message has two line breaks
    assert error_line(HOSTILE).isprintable()


def test_class_names_of_a_checkpoint_are_printable():
    classes = Classes.from_checkpoint({"class_names": {0: HOSTILE, 1: "dog"}}, 2)
    assert classes.name_of(0).isprintable()
    assert classes.name_of(1) == "dog"


def test_pictures_can_have_any_names(tmp_path):
    """Names may contain line breaks and formulas that matplotlib cannot draw."""
    name = Classes.from_checkpoint({"class_names": {0: HOSTILE}}, 1).name_of(0)
    picture = annotate(Image.new("RGB", (200, 100)), [[10, 10, 90, 90]], [0], [name])
    side_by_side([picture], [name])
    runs = [tmp_path / "$a_{$", tmp_path / "$b_{$"]
    for run in runs:
        run.mkdir()
        (run / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    for shown in (runs[:1], runs):
        plot_logs.plot_logs(shown, tmp_path / "curves")


def test_nouns_agree_with_their_numbers():
    assert counted(0, "epoch") == "0 epochs"
    assert [counted(n, "image") for n in (0, 1, 2_000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(2, noun) for noun in ("box", "class", "batch", "query")] == [
        "2 boxes",
        "2 classes",
        "2 batches",
        "2 queries",
    ]
    assert [counted(n, "box has", "boxes have") for n in (1, 2)] == ["1 box has", "2 boxes have"]
