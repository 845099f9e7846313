"""Signals and Ctrl-C: no code takes them for a damaged file, and each ends the process with its exit code."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision

from tests.conftest import ROOT, TINY, assert_same_end
from util.preemption import EXIT_CODE

# Sends this process a signal just before the NUMBERth call of a function, from within the code that calls it.
STRIKE = """
import importlib, os, signal, sys
import {module} as tool
owner = importlib.import_module("{owner}")
original, left = owner.{name}, [{number}]
def strike(*args, **kwargs):
    left[0] -= 1
    if left[0] in {at}:
        os.kill(os.getpid(), signal.{signal})
    return original(*args, **kwargs)
owner.{name} = strike
{run}
"""


def run_code(code: str, *flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def struck(place: str, name: str, *flags: object, number: int = 1, times: int = 1) -> subprocess.CompletedProcess:
    """Run main.py with a signal at the given call of the function `place`, and at the calls right after it."""
    owner, function = place.rsplit(".", 1)
    at = tuple(range(0, -times, -1))
    code = STRIKE.format(module="main", owner=owner, name=function, number=number, at=at, signal=name, run="tool.run()")
    return run_code(code, *flags)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    code = "import main; main.run()"
    done = run_code(code, *TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    ("name", "place", "flags"),
    [
        ("SIGTERM", "torch.load", ("--eval", "--resume", "CHECKPOINT")),
        ("SIGUSR1", "torch.load", ("--epochs", 2, "--resume", "auto")),
        ("SIGTERM", "torch.load", ("--epochs", 1, "--finetune", "CHECKPOINT", "--output_dir", "NEW")),
        ("SIGINT", "torch.load", ("--epochs", 1, "--backbone_weights", "BACKBONE", "--output_dir", "NEW")),
        ("SIGTERM", "datasets.coco.decode", ("--eval", "--resume", "CHECKPOINT", "--on_bad_image", "skip")),
    ],
    ids=["eval", "resume", "finetune", "backbone", "image"],
)
def test_a_signal_while_a_file_is_read_is_no_damaged_file(name, place, flags, shapes, trained, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    paths = {"CHECKPOINT": trained / "checkpoint.pth", "BACKBONE": tmp_path / "resnet18.pth", "NEW": tmp_path / "new"}
    flags = [paths.get(flag, flag) for flag in ("--output_dir", trained, *flags)]
    done = struck(place, name, *TINY, "--coco_path", shapes, *flags)
    assert done.returncode == (130 if name == "SIGINT" else EXIT_CODE), done.stderr
    printed = done.stdout + done.stderr
    assert all(word not in printed for word in ("damaged", "skipped", "cannot be", "Traceback", "Error"))


def test_a_signal_while_images_are_read_in_training_is_noted(shapes, tmp_path):
    """The step ends with all its images, and the run is resumed to the same end."""
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, "--on_bad_image", "skip", "--resume", "auto"]
    done = struck("datasets.coco.decode", "SIGTERM", *flags, "--output_dir", tmp_path / "struck", number=2)
    assert done.returncode == EXIT_CODE, done.stderr
    assert "could not be read" not in done.stdout
    for name in ("struck", "whole"):
        assert run_code("import main; main.run()", *flags, "--output_dir", tmp_path / name).returncode == 0
    assert_same_end(tmp_path / "struck", tmp_path / "whole")


def test_ctrl_c_finishes_the_step_and_saves(shapes, tmp_path):
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path, "--num_workers", 1]
    done = struck("engine.logged_losses", "SIGINT", *flags)
    assert done.returncode == 130, done.stderr
    assert "Ctrl-C: finishing this step; press it again to stop at once" in done.stderr
    assert "to resume, repeat the command with --resume auto" in done.stdout
    assert "Traceback" not in done.stderr
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] in (
        1,
        2,
    )  # noted on all processes at the next step


def test_the_second_ctrl_c_ends_at_once(shapes, tmp_path):
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path, "--num_workers", 1]
    done = struck("engine.logged_losses", "SIGINT", *flags, "--batch_size", 1, "--accum_steps", 6, times=2)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoint.pth").exists()


def test_without_an_output_folder_nothing_can_be_resumed(shapes):
    done = struck("engine.logged_losses", "SIGINT", *TINY, "--coco_path", shapes, "--epochs", 1)
    assert done.returncode == 130
    assert "warning: nothing will be saved, and the run cannot be resumed: name a folder by --output_dir" in done.stdout
    assert "nothing was saved: there is no --output_dir" in done.stdout
    assert "--resume auto" not in done.stdout


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_tools_end_with_one_line(name, code, shapes, tmp_path):
    program = STRIKE.format(
        module="scripts.check_data", owner="datasets.coco", name="decode", number=1, at=(0,), signal=name,
        run="from util.command import run_command; run_command(tool.main)",
    )  # fmt: skip
    done = run_code(program, "--coco_path", shapes, "--output_dir", tmp_path)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}"


@pytest.mark.slow
def test_signals_at_random_moments_are_never_lost(shapes, tmp_path):
    """Exit code 75 or 130 by the signal; 0 only if the run had finished; 143 before Python has set up its handlers."""
    flags = [sys.executable, ROOT / "main.py", *TINY, "--coco_path", shapes, "--epochs", 2, "--lr_drop", 1]
    flags = [*map(str, flags), "--resume", "auto", "--save_every", "1"]
    start = time.monotonic()
    subprocess.run([*flags, "--output_dir", str(tmp_path / "whole")], check=True, capture_output=True)
    duration = time.monotonic() - start
    rng = random.Random(0)
    for number in range(30):
        output = tmp_path / str(number)
        command = [*flags, "--output_dir", str(output), "--num_workers", str(number % 2)]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(rng.uniform(0.2, duration))
        name = rng.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
        run.send_signal(getattr(signal, name))
        printed = run.communicate(timeout=120)[0]
        allowed = {130} if name == "SIGINT" else {EXIT_CODE}
        if "training took" in printed:
            allowed = allowed | {0}
        assert run.returncode in allowed, (number, name, run.returncode, printed)
        assert "Traceback" not in printed and "damaged" not in printed, printed
        subprocess.run(command, check=True, capture_output=True)
        assert_same_end(output, tmp_path / "whole")
