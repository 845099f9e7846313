"""The recipes: one shell script a model, run by torchrun."""

import os
import subprocess
from pathlib import Path

import pytest

from main import get_args_parser
from tests.conftest import ROOT

RECIPES = {
    "conddetr_r50_epoch50": ("resnet50", False, 2),
    "conddetr_r50dc5_epoch50": ("resnet50", True, 1),
    "conddetr_r101_epoch50": ("resnet101", False, 2),
    "conddetr_r101dc5_epoch50": ("resnet101", True, 1),
}


@pytest.fixture
def call(tmp_path):
    """Runs a recipe from a foreign folder with a torchrun that only prints its arguments."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)

    def call(recipe: str, *flags: str, **env: str) -> list[str]:
        command = ["bash", str(ROOT / "scripts" / f"{recipe}.sh"), *flags]
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[:-1]

    return call


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, call):
    standalone, processes, main, *flags = call(recipe)
    assert (standalone, processes) == ("--standalone", "--nproc_per_node=8")
    assert Path(main).samefile(ROOT / "main.py")
    args = get_args_parser().parse_args(flags)
    assert (args.backbone, args.dilation, args.batch_size) == RECIPES[recipe]
    assert (args.epochs, args.lr_drop, args.resume, args.output_dir) == (50, 40, "auto", f"output/{recipe}")


def test_settings_from_the_environment_and_further_flags(call):
    env = {"NGPU": "2", "COCO_PATH": "/my data", "OUTPUT_DIR": "out"}
    _, processes, _, *flags = call("conddetr_r50_epoch50", "--epochs", "75", "--lr_drop", "60", **env)
    assert processes == "--nproc_per_node=2"
    args = get_args_parser().parse_args(flags)
    assert (args.coco_path, args.output_dir, args.epochs, args.lr_drop) == ("/my data", "out", 75, 60)
