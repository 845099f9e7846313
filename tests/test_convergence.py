"""Comparison of models: the runs that the script starts, and the figure and tables that are made from them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from flags.parser import get_args_parser
from scripts import convergence
from tests.conftest import ROOT
from util.errors import InputError

APS = {
    "conditional_detr/seed1": [0.1, 0.3, 0.5, 0.6],
    "conditional_detr/seed2": [0.1, 0.1, 0.3, 0.4],
    "detr/seed1": [0.0, 0.1, 0.1, 0.2],
    "detr/seed2": [0.0, 0.0, 0.1, 0.1],
}


def write(runs: Path, aps: dict[str, list[float | None]]) -> Path:
    for name, values in aps.items():
        (runs / name).mkdir(parents=True)
        entries = [{"epoch": epoch} | ({"test_coco_eval_bbox": [ap] * 12} if ap is not None else {})
                   for epoch, ap in enumerate(values)]  # fmt: skip
        (runs / name / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return runs


def test_figure_and_tables(tmp_path, capsys):
    convergence.main(["--runs", str(write(tmp_path, APS))])
    text = (tmp_path / "convergence.md").read_text()
    assert text in capsys.readouterr().out
    assert text.splitlines() == [
        "| AP at epoch | Conditional DETR | DETR |",
        "| --- | --- | --- |",
        "| 1 | 0.100 (0.100 to 0.100) | 0.000 (0.000 to 0.000) |",
        "| 2 | 0.200 (0.100 to 0.300) | 0.050 (0.000 to 0.100) |",
        "| 3 | 0.400 (0.300 to 0.500) | 0.100 (0.100 to 0.100) |",
        "| 4 | 0.500 (0.400 to 0.600) | 0.150 (0.100 to 0.200) |",
        "",
        "| epochs until AP | Conditional DETR | DETR |",
        "| --- | --- | --- |",
        "| 0.500, Conditional DETR after 4 epochs | 3 to more than 4 | more than 4 |",
        "| 0.150, DETR after 4 epochs | 2 to 3 | 4 to more than 4 |",
    ]
    assert Image.open(tmp_path / "convergence.png").width > 600
    assert (tmp_path / "convergence.svg").exists()


def test_an_unfinished_comparison(tmp_path):
    """Runs may be shorter, evaluated every other epoch, not yet evaluated, or of another model."""
    aps = APS | {"conditional_detr/seed2": [None, 0.2], "group/seed1": [None, 0.1, None, 0.2], "detr/seed3": [None]}
    curves = convergence.read_curves(write(tmp_path, aps))
    assert {name: curve.epochs.tolist() for name, curve in curves.items()} == {"conditional_detr": [2], "group": [2, 4]}
    assert "| 2 | 0.250 (0.200 to 0.300) | 0.100 (0.100 to 0.100) |" in convergence.tables(curves)


def test_without_runs(tmp_path):
    with pytest.raises(InputError, match=r"no evaluated run in MODEL/seed\*/log.txt"):
        convergence.main(["--runs", str(tmp_path)])


@pytest.fixture
def call(tmp_path):
    """Return a function that runs the script with programs that only record their arguments.

    It returns the commands with main.py, in order.
    """
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "convergence.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "venv.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."\n')
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls.txt\n')
        (tmp_path / name).chmod(0o755)

    def call(*flags: str, **env: str) -> list[list[str]]:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
        subprocess.run(["bash", script, *flags], cwd=tmp_path, env=env, check=True)
        lines = (tmp_path / "calls.txt").read_text().splitlines()
        return [line.split() for line in lines if "main.py" in line]

    return call


@pytest.mark.parametrize("coco", [False, True])
def test_runs_differ_only_in_model_and_seed(coco, call):
    flags = ["--coco_path", "/coco"] if coco else ["--batch_size", "8"]
    calls = call(*flags, SEEDS="4 5", OUTPUT_DIR="out")
    runs, rests = [], []
    for words in calls:
        start, given = words[: words.index("main.py")], words[words.index("main.py") + 1 :]
        assert start == (["torchrun", "--standalone", "--nproc_per_node=8"] if coco else ["python"])
        args = vars(get_args_parser().parse_args([*given, "--device", "cpu"]))
        runs.append([args.pop(name) for name in ("output_dir", "model", "group_detr", "seed")])
        assert (args["num_queries"], args["resume"]) == (100 if coco else 20, "auto")
        assert (args["coco_path"], args["batch_size"]) == (("/coco", 2) if coco else ("out/data", 8))
        rests.append(args)
    assert rests == rests[:1] * 6
    models = {"conditional_detr": ("conditional_detr", 1), "detr": ("detr", 1), "group_detr": ("conditional_detr", 11)}
    assert runs == [[f"out/{name}/seed{seed}", *model, seed] for seed in (4, 5) for name, model in models.items()]
