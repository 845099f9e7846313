"""The benchmark: its parts run on small sizes, its report is complete, and competitors run in other processes."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from scripts import benchmark
from scripts.benchmarking import data, model, onnx_peers, peer
from tests.small import FLAGS
from util.errors import InputError

OTHERS = "r50 transformers", "r50 ONNX Runtime", "r50 OpenVINO"


@contextmanager
def no_work(*_args) -> Iterator[peer.Runs]:
    """Stand in for the runs of a competitor."""
    yield {"none": lambda: None}


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_a_small_run(part, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    flags = f"--parts {part} --device cpu --size 64 64 --repeats 1 --amp none --json {report} --group_detr 1 2"
    monkeypatch.setattr(benchmark, "peer_runs", no_work)
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    benchmark.main()
    written = json.loads(report.read_text())
    assert written["machine"]["matmul GFLOP/s"]["float32"] > 0
    assert written["machine"]["others"].keys() == {"transformers", "onnxruntime", "openvino"}
    row, *others = written[part]
    assert row["model"] == "r50"
    assert [other["model"] for other in others] == [
        *{
            "inference": ["r50, prepared", "r50, attention weights in full", *OTHERS],
            "training": ["r50, 2 groups", "r50 transformers"],
            "masks": ["r50"] * 3,
        }[part]
    ]
    assert row["ms"] > 0
    printed = capsys.readouterr().out
    assert f"| {row['model']} | float32 |" in printed
    if part == "masks":
        assert [other["masks"] for other in others] == ["masks of all queries", "masks needed", "masks of all queries"]
    elif part == "inference":
        assert row["parameters M"] == 43.5
        assert 0 < row["GFLOP per image"] < 170.5
        assert row["images/s"] == pytest.approx(1e3 / row["ms"], rel=0.01)
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


def test_a_step_has_few_operators(tmp_path):
    """Their number limits the speed on GPUs with small batches."""
    report = tmp_path / "report.json"
    flags = "--parts operators --device cpu --size 64 64 --batch_sizes 1 --amp none bf16"
    benchmark.main([*flags.split(), "--json", str(report)])
    for row, limit in zip(json.loads(report.read_text())["operators"], (2400, 3000), strict=True):
        parts = [row[name] for name in ("forward", "matching and losses", "backward", "clip and AdamW")]
        assert sum(parts) <= row["operators"] < limit


def test_loading_and_scoring_on_the_host(tmp_path):
    data.write_photos(tmp_path, np.random.default_rng(0), images=1)
    for split in ("train", "val"):
        for run in data.loading_runs(tmp_path, 1, split).values():
            run()
    for run in data.scoring_runs(np.random.default_rng(0), images=2).values():
        run()


def make_runs(flags: argparse.Namespace, file: Path) -> peer.Runs:
    return {"none": lambda: file.write_text(str(os.getpid())), "bf16": lambda: os._exit(1)}


def test_a_competitor_runs_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "installed_version", lambda name: "1.0")
    flags = argparse.Namespace(no_peer=False, device="cpu", amp=["none", "bf16", "fp16"])
    written = tmp_path / "pid"
    with peer.peer_runs("openvino", "r101", make_runs, flags, written) as runs:
        assert list(runs) == ["none", "bf16"]
        runs["none"]()
        assert int(written.read_text()) != os.getpid()
        assert runs["none"].peak_mib() is None
        with pytest.raises(InputError, match="process of openvino has ended; pass --no_peer"):
            runs["bf16"]()


@pytest.mark.parametrize(
    ("name", "variant", "changed", "installed"),
    [
        ("transformers", "r101", {}, True),
        ("transformers", "r50", {"no_peer": True}, True),
        ("transformers", "r50", {}, False),
        ("openvino", "r50", {"device": "cuda"}, True),
        ("onnxruntime", "r50", {}, False),
    ],
)
def test_competitors_that_do_not_take_part(name, variant, changed, installed, monkeypatch):
    monkeypatch.setitem(peer.PACKAGES, name, ("torch",) if installed else ("torch", "not-a-package"))
    flags = argparse.Namespace(**{"no_peer": False, "device": "cpu", "amp": ["none"]} | changed)
    with peer.peer_runs(name, variant, make_runs, flags) as runs:
        assert runs == {}


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_measured_calls_of_onnx_runtimes(runtime, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    monkeypatch.setitem(model.VARIANTS, "small", tuple(map(str, FLAGS)))
    flags = argparse.Namespace(size=(64, 96), amp=["none", "bf16", "fp16"])
    runs = onnx_peers.inference_of_runtime(runtime, "small", flags, 2)
    assert set(runs) == ({"none", "bf16"} if "bf16" in onnx_peers.precisions(runtime) else {"none"})
    assert runs["none"]()["pred_logits"].shape == (2, 7, 91)


@pytest.mark.parametrize("make", ["inference_of_transformers", "training_of_transformers"])
def test_measured_calls_of_transformers(make):
    pytest.importorskip("transformers")
    flags = argparse.Namespace(device="cpu", size=(64, 64), amp=["none"])
    getattr(peer, make)(flags, 2)["none"]()
