"""A run that is interrupted at any moment and goes on ends like one that never was: every bit, and every line."""

import multiprocessing
import random
import signal

import pytest
import torch

from tests import killed
from tests.conftest import TINY, assert_same_end
from util.preemption import EXIT_CODE

# A step and its checkpoint have 9 of the moments that `killed` knows, so that some progress is sure to be made.
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


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGUSR1, 1),  # in the first step
        (signal.SIGTERM, 3),  # in its checkpoint
        (signal.SIGTERM, 20),  # in the checkpoint of an epoch's end
        (signal.SIGTERM, 28),  # in the evaluation
        (signal.SIGTERM, 33),  # in the best checkpoint
        (signal.SIGTERM, 38),  # behind the epoch's line in the log
    ],
)
def test_asked_to_end(number, moment, shapes, tmp_path, run, whole):
    assert run(flags(shapes, tmp_path, "--epochs", 2, "--num_workers", 1), moment, number) == EXIT_CODE
    assert run(flags(shapes, tmp_path, "--epochs", 2)) == 0
    assert_same_end(tmp_path, whole(2))


def test_the_published_reader_repeats_an_interrupted_epoch(shapes, tmp_path, run):
    assert run(flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 1), 12, signal.SIGTERM) == EXIT_CODE
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == (0, 3)
    checkpoint = torch.load(tmp_path / "checkpoint_previous.pth", weights_only=True)
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == (0, 2)


def test_an_unreadable_checkpoint_is_named_and_the_one_before_it_taken(shapes, tmp_path, run, run_main, whole):
    assert run(flags(shapes, tmp_path, "--epochs", 2), 30) == -signal.SIGKILL
    latest = tmp_path / "checkpoint.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    done = run_main(*flags(shapes, tmp_path, "--epochs", 2))
    assert f"warning: {latest}: not a checkpoint, or a damaged one" in done.stdout
    assert f"loading {tmp_path / 'checkpoint_previous.pth'}, 0 epochs trained and 2 steps" in done.stdout
    assert_same_end(tmp_path, whole(2))
