"""The benchmark runs, and its report has what it promises."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import benchmark
from scripts.benchmarking import data, peer
from util.errors import InputError


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_a_small_run(part, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    flags = (
        f"--parts {part} --device cpu --size 64 64 --repeats 1 --amp none --no_peer --json {report} --group_detr 1 2"
    )
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    benchmark.main()
    written = json.loads(report.read_text())
    assert written["machine"]["matmul GFLOP/s"]["float32"] > 0
    row, *others = written[part]
    assert row["model"] == "r50"
    assert [other["model"] for other in others] == [
        *{"inference": ["r50, attention weights in full"], "training": ["r50, 2 groups"], "masks": ["r50"] * 3}[part]
    ]
    assert row["ms"] > 0
    printed = capsys.readouterr().out
    assert f"| {row['model']} | float32 |" in printed
    if part == "masks":
        assert [other["masks"] for other in others] == ["masks of all queries", "masks needed", "masks of all queries"]
    elif part == "inference":
        assert row["parameters M"] == 43.5
        assert 0 < row["GFLOP"] < 170.5
    else:
        assert all(row[f"{name} ms"] > 0 for name in ("forward", "matching", "backward", "clip and AdamW"))


def test_counts_of_all_models_are_the_published_ones(tmp_path):
    """Published multiply-adds are means over 100 images, of which 800×1066 is not the largest size."""
    report = tmp_path / "report.json"
    benchmark.main(["--parts", "counts", "--device", "cpu", "--amp", "none", "--json", str(report)])
    rows = json.loads(report.read_text())["counts"]
    assert [row["multiply-adds G"] for row in rows[:4]] == [85.2, 180.9, 148.7, 244.4]
    assert [row["model"] for row in rows[4:]] == ["detr_r50", "detr_r50dc5", "detr_r101", "detr_r101dc5"]
    assert [row["published multiply-adds G"] for row in rows[4:]] == [86, 187, 152, 253]
    for row in rows:
        assert abs(row["parameters M"] - row["published parameters M"]) < 1
        assert 0.92 < row["multiply-adds G"] / row["published multiply-adds G"] < 1


def test_the_hosts_parts(tmp_path):
    data.write_photos(tmp_path, np.random.default_rng(0), images=1)
    for split in ("train", "val"):
        for run in data.loading_runs(tmp_path, 1, split).values():
            run()
    for run in data.scoring_runs(np.random.default_rng(0), images=2).values():
        run()


def make_runs(flags: argparse.Namespace, file: Path) -> peer.Runs:
    return {"none": lambda: file.write_text(str(os.getpid())), "bf16": lambda: os._exit(1)}


def test_the_competitor_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "find_spec", lambda name: name)
    flags = argparse.Namespace(no_peer=False, device="cpu", amp=["none", "bf16"])
    written = tmp_path / "pid"
    with peer.peer_runs("r50", make_runs, flags, written) as runs:
        runs["none"]()
        assert int(written.read_text()) != os.getpid()
        assert runs["none"].peak_mib() is None
        with pytest.raises(InputError, match="--no_peer"):
            runs["bf16"]()
    for flags.no_peer, variant in ((True, "r50"), (False, "r101")):
        with peer.peer_runs(variant, make_runs, flags) as runs:
            assert runs == {}


@pytest.mark.parametrize("make", ["inference_of_peer", "training_of_peer"])
def test_transformers_computes_what_is_measured(make):
    pytest.importorskip("transformers")
    flags = argparse.Namespace(device="cpu", size=(64, 64), amp=["none"])
    batch = {"training_of_peer": [1]}.get(make, [])
    getattr(peer, make)(flags, *batch)["none"]()
