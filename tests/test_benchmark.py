"""The benchmark runs, and its report has what it promises."""

import json
import sys

import numpy as np
import pytest

from scripts import benchmark, benchmark_data


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_a_small_run(part, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    flags = f"--parts {part} --device cpu --size 64 64 --repeats 1 --amp none --no_peer --json {report}"
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    benchmark.main()
    written = json.loads(report.read_text())
    assert written["machine"]["matmul GFLOP/s"]["float32"] > 0
    (row,) = written[part]
    assert row["model"] == "r50"
    assert row["ms"] > 0
    printed = capsys.readouterr().out
    assert f"| {row['model']} | float32 |" in printed
    if part == "inference":
        assert row["parameters M"] == 43.5
        assert 0 < row["GFLOP"] < 170.5
    else:
        assert all(row[f"{name} ms"] > 0 for name in ("forward", "matching", "backward", "clip and AdamW"))


def test_the_hosts_parts(tmp_path):
    benchmark_data.write_photos(tmp_path, np.random.default_rng(0), images=1)
    for split in ("train", "val"):
        for run in benchmark_data.loading_runs(tmp_path, 1, split).values():
            run()
    for run in benchmark_data.scoring_runs(np.random.default_rng(0), images=2).values():
        run()
