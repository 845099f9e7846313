"""Curves of runs show their logs: of finished runs, of runs that still train, and of the published code."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from scripts import plot_logs
from util.errors import InputError


def entries(epochs: int, evaluated: int) -> list[dict]:
    log = [{"epoch": epoch, "train_loss": 9.0 - epoch} for epoch in range(epochs)]
    for entry in log[:evaluated]:
        ap = (entry["epoch"] + 1) / 100
        entry |= {"test_loss": entry["train_loss"] + 1, "test_coco_eval_bbox": [ap, 2 * ap, *[0.0] * 10]}
    return log


def write(folder: Path, epochs: int, evaluated: int | None = None, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(entry) + "\n" for entry in entries(epochs, epochs if evaluated is None else evaluated)]
    (folder / "log.txt").write_text("".join(lines) + tail)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Return a function that returns the points of the last figure's curves by (axes, colour, line style)."""
    figures = []
    draw = plot_logs.draw
    monkeypatch.setattr(plot_logs, "draw", lambda logs: figures.append(draw(logs)) or figures[-1])

    def curves() -> dict[tuple, list[tuple[float, float]]]:
        return {
            (axes.get_title(), mpl.colors.to_hex(line.get_color()), line.get_linestyle()): list(
                zip(*map(list, line.get_data()), strict=True)
            )
            for axes in figures[-1].axes
            for line in axes.lines
        }

    curves.figures = figures
    return curves


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


BLUE, ORANGE = (mpl.colors.to_hex(colour) for colour in plot_logs.COLOURS[:2])


def test_a_single_run_has_curves_of_its_losses_and_ap(tmp_path, drawn, capsys):
    run = write(tmp_path / "my run", 3)
    plot_logs.main([str(run), "--output", str(tmp_path / "new" / "curves.v2")])
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path}/new/curves.v2.{kind}" for kind in ("png", "svg")]
    pixels = np.asarray(Image.open(tmp_path / "new" / "curves.v2.png").convert("RGB"))
    assert pixels.shape[1] > 900
    for colour in plot_logs.COLOURS[:2]:
        assert (abs(pixels / 255.0 - colour).max(-1) < 0.02).sum() > 100
    assert ET.parse(tmp_path / "new" / "curves.v2.svg").getroot().tag.endswith("svg")
    assert drawn() == {
        ("Loss", BLUE, "--"): [(1, 9), (2, 8), (3, 7)],
        ("Loss", BLUE, "-"): [(1, 10), (2, 9), (3, 8)],
        ("Average precision on val", BLUE, "-"): [(1, 0.01), (2, 0.02), (3, 0.03)],
        ("Average precision on val", ORANGE, "-"): [(1, 0.02), (2, 0.04), (3, 0.06)],
    }
    assert drawn.figures[0].get_suptitle() == "my run"


def test_a_run_with_masks_has_curves_of_their_ap(tmp_path, drawn):
    masks = {"test_coco_eval_masks": [0.1, 0.2, *[0.0] * 10]}
    lines = [json.dumps(entry | masks) + "\n" for entry in entries(2, 2)]
    (tmp_path / "log.txt").write_text("".join(lines))
    plot_logs.plot_logs([tmp_path], tmp_path / "curves")
    curves = [values for (axes, *_), values in drawn().items() if axes != "Loss"]
    assert curves[2:] == [[(1, 0.1), (2, 0.1)], [(1, 0.2), (2, 0.2)]]
    names = [text.get_text() for text in drawn.figures[0].axes[1].get_legend().get_texts()]
    assert names == ["AP", "AP50", "mask AP", "mask AP50"]


def test_runs_of_different_lengths_are_compared(tmp_path, drawn):
    long, live = write(tmp_path / "long", 4), write(tmp_path / "live", 2, 1, tail='{"epoch": 2, "train_l')
    paths = plot_logs.plot_logs([long, live, long], tmp_path / "both.svg")
    assert paths == [tmp_path / "both.png", tmp_path / "both.svg"]
    assert all(path.exists() for path in paths)
    curves = drawn()
    assert {key: len(values) for key, values in curves.items()} == {
        ("Loss", BLUE, "--"): 4,
        ("Loss", BLUE, "-"): 4,
        ("AP on val", BLUE, "-"): 4,
        ("Loss", ORANGE, "--"): 2,
        ("Loss", ORANGE, "-"): 1,
        ("AP on val", ORANGE, "-"): 1,
    }
    assert curves["AP on val", ORANGE, "-"] == [(1, 0.01)]
    assert legend(drawn.figures[0]) == ["long", "live"]


def test_runs_of_equal_names_are_shown_with_their_folders(tmp_path, drawn):
    runs = [write(tmp_path / name, 1) for name in ("a/seed1/run", "b/seed1/run", "other")]
    plot_logs.plot_logs(runs, tmp_path / "curves")
    assert legend(drawn.figures[0]) == ["a/seed1/run", "b/seed1/run", "other"]


def test_log_files_urls_and_published_logs_can_be_named(tmp_path, drawn, monkeypatch):
    """The published logs are those of DETR, which are downloaded."""
    long = write(tmp_path / "published", 100) / "log.txt"
    asked = []

    def download(url, target, **_):
        asked.append(url)
        Path(target).write_bytes(long.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    own = write(tmp_path / "run", 2) / "log.txt"
    renamed = own.rename(own.with_name("other_log.txt"))
    plot_logs.main([str(renamed), "detr_resnet101_dc5", long.as_uri(), "--output", str(tmp_path / "curves")])
    assert asked == ["https://dl.fbaipublicfiles.com/detr/logs/detr-r101-dc5_log.txt"]
    assert legend(drawn.figures[0]) == ["other_log.txt", "detr_resnet101_dc5, published", "log.txt"]
    assert sorted(len(values) for values in drawn().values()) == [2] * 3 + [100] * 6

    (tmp_path / "detr_resnet50").mkdir()  # a local folder has precedence
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"detr_resnet50/log\.txt: no such file"):
        plot_logs.main(["detr_resnet50"])


def test_a_run_without_evaluations_says_so(tmp_path, drawn):
    plot_logs.plot_logs([write(tmp_path / "run", 2, evaluated=0)], tmp_path / "curves")
    assert drawn()["Loss", BLUE, "--"] == [(1, 9), (2, 8)]
    assert [text.get_text() for text in drawn.figures[0].axes[1].texts] == ["no evaluation yet"]


def test_noise_is_not_scaled_to_full_height(tmp_path, drawn):
    """A loss that varies by 0.01 % and an AP of 0.0004 are flat; a clear descent fills its axis."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"epoch": epoch, "train_loss": 5 + wave, "test_loss": 5 - wave, "test_coco_eval_bbox": [0.0002 + wave] * 12}
        for epoch, wave in enumerate((0.0002, -0.0002) * 5)
    ]
    (run / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_logs.plot_logs([run], tmp_path / "curves")
    loss, precision = drawn.figures[-1].axes
    low, high = loss.get_ylim()
    assert low < 4.8 and high > 5.2
    assert precision.get_ylim() == (0, 0.1)

    plot_logs.plot_logs([write(tmp_path / "descent", 8)], tmp_path / "curves")
    low, high = drawn.figures[-1].axes[0].get_ylim()
    assert high - low < 1.2 * (10 - 2)


def test_mistakes_end_in_one_line(tmp_path):
    run = write(tmp_path / "run", 1)
    cases = {"empty": b"", "begun": b'{"epoch": 0, "train_lo', "binary": bytes(range(256))}
    for name, contents in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_bytes(contents)
        with pytest.raises(InputError, match=rf"{name}/log\.txt: it has no finished epoch yet"):
            plot_logs.main([str(run), str(tmp_path / name)])
    with pytest.raises(InputError, match=r"nowhere/log\.txt: no such file"):
        plot_logs.main([str(run), str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="cannot be written"):
        plot_logs.main([str(run), "--output", str(run / "log.txt" / "curves")])
