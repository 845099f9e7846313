"""A run that is interrupted at any moment and goes on ends like one that never was: every bit, and every line."""

import multiprocessing
import random
import signal

import pytest
import torch

from tests import killed
from tests.conftest import TINY
from util.preemption import EXIT_CODE

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# A step and its checkpoint have 11 of the moments that `killed` knows, so that some progress is sure to be made.
MOMENTS = (1, 25)


def flags(shapes, output, *more: object) -> list[str]:
    common = ("--dropout", 0.1, "--lr_drop", 2, "--save_every", 1, "--resume", "auto")
    return [*TINY, "--coco_path", str(shapes), "--output_dir", str(output), *map(str, (*common, *more))]


@pytest.fixture(scope="module")
def run():
    """Runs main.py in a fresh process, quickly: what it imports is imported already. Returns the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed"])

    def run(flags: list[str], moment: int = 0, number: int = signal.SIGKILL) -> int:
        process = context.Process(target=killed.run, args=(flags, moment, number))
        process.start()
        process.join(120)
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(shapes, run, tmp_path_factory):
    """Runs of some epochs that nobody interrupted."""

    def whole(epochs: int):
        output = tmp_path_factory.getbasetemp() / f"whole{epochs}"
        if not output.exists():
            assert run(flags(shapes, output, "--epochs", epochs)) == 0
        return output

    return whole


def assert_same_end(output, expected) -> None:
    ours, theirs = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (output, expected))
    for key in ("epoch", "step", "skipped", "processes", "train_stats"):
        assert ours[key] == theirs[key]
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key
    for index, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], value), (index, name)
    assert (output / "log.txt").read_text() == (expected / "log.txt").read_text()


@pytest.mark.parametrize(("epochs", "kills"), [(2, 4), pytest.param(8, 25, marks=pytest.mark.slow)])
def test_killed_again_and_again(epochs, kills, shapes, tmp_path, run, whole):
    rng = random.Random(epochs)
    killed_at = []
    exit_code = None
    while exit_code != 0:
        moment = rng.randint(*MOMENTS)
        workers = ("--num_workers", rng.randint(0, 2))
        exit_code = run(flags(shapes, tmp_path, "--epochs", epochs, *workers), moment)
        assert exit_code in (0, -signal.SIGKILL)
        killed_at += [moment] * bool(exit_code)
    assert len(killed_at) >= kills
    assert_same_end(tmp_path, whole(epochs))


@pytest.mark.parametrize("moment", [1, 5, 11, 36, 37, 40])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end(number, moment, shapes, tmp_path, run, whole):
    """Around a step, in a checkpoint, between an epoch's checkpoint and its line in the log."""
    assert run(flags(shapes, tmp_path, "--epochs", 2, "--num_workers", 1), moment, number) == EXIT_CODE
    assert run(flags(shapes, tmp_path, "--epochs", 2)) == 0
    assert_same_end(tmp_path, whole(2))
