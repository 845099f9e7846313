"""The recipes: one shell script per model, run by torchrun."""

import os
import subprocess
from pathlib import Path

import pytest

from main import get_args_parser
from tests.conftest import ROOT

VARIANTS = {
    "r50": ("resnet50", False, 2),
    "r50dc5": ("resnet50", True, 1),
    "r101": ("resnet101", False, 2),
    "r101dc5": ("resnet101", True, 1),
}
RECIPES = [
    (model, variant, epochs)
    for variant in VARIANTS
    for model, epochs in (("conddetr", 50), ("detr", 50), ("detr", 500))
]


@pytest.fixture
def call(tmp_path):
    """Run a recipe in another folder, with a torchrun that only prints its arguments, and return these."""
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


def test_the_recipe_of_group_detr_has_the_flags_of_its_name(call):
    args = get_args_parser().parse_args(call("conddetr_r50_epoch12_groupdetr11")[3:])
    assert (args.group_detr, args.epochs, args.lr_drop, args.batch_size, args.resume) == (11, 12, 11, 2, "auto")
    assert (args.model, args.backbone, args.dilation) == ("conditional_detr", "resnet50", False)
    assert args.output_dir == "output/conddetr_r50_epoch12_groupdetr11"


@pytest.mark.parametrize(("model", "variant", "epochs"), RECIPES)
def test_recipes_have_the_flags_of_their_names(model, variant, epochs, call):
    recipe = f"{model}_{variant}_epoch{epochs}"
    standalone, processes, main, *flags = call(recipe)
    assert (standalone, processes) == ("--standalone", "--nproc_per_node=8")
    assert Path(main).samefile(ROOT / "main.py")
    args = get_args_parser().parse_args(flags)
    images = 8 if recipe == "detr_r50_epoch500" else VARIANTS[variant][2]  # per GPU and step
    assert (args.backbone, args.dilation, args.batch_size * args.accum_steps) == (*VARIANTS[variant][:2], images)
    assert args.model == {"detr": "detr", "conddetr": "conditional_detr"}[model]
    assert (args.epochs, args.lr_drop, args.resume) == (epochs, epochs * 4 // 5, "auto")
    assert args.output_dir == f"output/{recipe}"


def test_recipes_take_settings_from_the_environment_and_more_flags(call):
    env = {"NGPU": "2", "COCO_PATH": "/my data", "OUTPUT_DIR": "out"}
    _, processes, _, *flags = call("conddetr_r50_epoch50", "--epochs", "75", "--lr_drop", "60", **env)
    assert processes == "--nproc_per_node=2"
    args = get_args_parser().parse_args(flags)
    assert (args.coco_path, args.output_dir, args.epochs, args.lr_drop) == ("/my data", "out", 75, 60)


@pytest.mark.parametrize("exit_code", [0, 1, 75])
def test_slurm_requeues_a_job_that_was_asked_to_end(exit_code, tmp_path):
    """The srun and scontrol of this test only write down their arguments."""
    for name, code in (("srun", exit_code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm_train.sh"), "--dilation"], env=env, capture_output=True, check=False
    )
    assert done.returncode == exit_code
    kill, python, script, *flags = (tmp_path / "srun.txt").read_text().splitlines()
    assert (kill, python, script) == ("--kill-on-bad-exit=1", "python", "main.py")
    args = get_args_parser().parse_args(flags)
    assert (args.resume, args.save_every, args.dilation) == ("auto", 500, True)
    requeued = tmp_path / "scontrol.txt"
    assert requeued.exists() == (exit_code == 75)
    assert not requeued.exists() or requeued.read_text().split() == ["requeue", "7"]
