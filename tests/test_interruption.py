"""A run that is interrupted at any moment and resumed ends like one without interruption, bit for bit."""

import random
import signal

import pytest
import torch

from tests import killed
from tests.conftest import TINY, assert_same_end
from tests.forked import CONTEXT, run_main
from util.preemption import EXIT_CODE

# Moments of the first two steps of a start, so that most starts are killed, and yet the run makes progress.
MOMENTS = [
    moment.format(step)
    for step in (1, 2)
    for moment in (
        "before step {}",
        "after step {}",
        "halfway into checkpoint.pth after step {}",
        "at the end of checkpoint.pth after step {}",
        "before checkpoint.pth is in place after step {}",
        "after checkpoint.pth is in place after step {}",
    )
]


def flags(shapes, output, *more: object) -> list[str]:
    common = ("--dropout", 0.1, "--lr_drop", 2, "--ema_decay", 0.8, "--save_every", 1, "--resume", "auto")
    return [*TINY, "--coco_path", str(shapes), "--output_dir", str(output), *map(str, (*common, *more))]


@pytest.fixture(scope="module")
def run():
    """Run main.py in another process, and return its exit code."""

    def run(flags: list[str], moment: str = "", number: int = signal.SIGKILL) -> int:
        process = CONTEXT.Process(target=killed.run, args=(flags, moment, number))
        process.start()
        process.join(120)
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(shapes, run, tmp_path_factory):
    """Return the folder of a run of some epochs that was not interrupted."""

    def whole(epochs: int):
        output = tmp_path_factory.getbasetemp() / f"whole{epochs}"
        if not output.exists():
            assert run(flags(shapes, output, "--epochs", epochs)) == 0
        return output

    return whole


@pytest.mark.parametrize(("epochs", "kills"), [(2, 4), pytest.param(8, 25, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_the_same(epochs, kills, shapes, tmp_path, run, whole):
    rng = random.Random(epochs)
    killed_at = []
    exit_code = None
    while exit_code != 0:
        moment = rng.choice(MOMENTS)
        workers = ("--num_workers", rng.randint(0, 2))
        exit_code = run(flags(shapes, tmp_path, "--epochs", epochs, *workers), moment)
        assert exit_code in (0, -signal.SIGKILL)
        killed_at += [moment] * bool(exit_code)
    assert len(killed_at) >= kills
    assert_same_end(tmp_path, whole(epochs))


@pytest.mark.parametrize("moment", ["halfway into checkpoint_best.pth", "before the log line", "after the log line"])
def test_a_run_that_is_killed_at_the_end_of_an_epoch_ends_the_same(moment, shapes, tmp_path, run, whole):
    code = run(flags(shapes, tmp_path, "--epochs", 2), f"{moment} after step 3")
    assert code == -signal.SIGKILL, f"{moment!r} never came"
    assert run(flags(shapes, tmp_path, "--epochs", 2)) == 0
    assert_same_end(tmp_path, whole(2))


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGUSR1, "before step 1"),
        (signal.SIGTERM, "halfway into checkpoint.pth after step 1"),
        (signal.SIGTERM, "halfway into checkpoint.pth after step 3"),  # the end of the epoch
        (signal.SIGTERM, "halfway into latest.pth after step 3"),  # in the evaluation
        (signal.SIGTERM, "halfway into checkpoint_best.pth after step 3"),
        (signal.SIGTERM, "after the log line after step 3"),
    ],
)
def test_a_run_that_is_asked_to_end_and_resumed_ends_the_same(number, moment, shapes, tmp_path, run, whole):
    assert run(flags(shapes, tmp_path, "--epochs", 2, "--num_workers", 1), moment, number) == EXIT_CODE, (
        f"{moment} never came"
    )
    assert run(flags(shapes, tmp_path, "--epochs", 2)) == 0
    assert_same_end(tmp_path, whole(2))


def test_the_published_code_would_repeat_an_interrupted_epoch(shapes, tmp_path, run):
    assert (
        run(
            flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 1),
            "before checkpoint.pth is in place after step 2",
            signal.SIGTERM,
        )
        == EXIT_CODE
    )
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == (0, 3)
    checkpoint = torch.load(tmp_path / "checkpoint_previous.pth", weights_only=True)
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == (0, 2)


def test_an_unreadable_checkpoint_is_named_and_the_previous_one_used(
    shapes, tmp_path, run, whole, narrow, tmp_path_factory
):
    assert run(flags(shapes, tmp_path, "--epochs", 2), "halfway into latest.pth after step 3") == -signal.SIGKILL
    latest = tmp_path / "checkpoint.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    done = run_main(flags(shapes, tmp_path, "--epochs", 2), tmp_path_factory.mktemp("printed"))
    assert f"warning: {latest}: not a checkpoint, or a damaged one" in done.stdout
    assert f"loading {tmp_path / 'checkpoint_previous.pth'}, 0 epochs trained and 2 steps" in done.stdout
    assert_same_end(tmp_path, whole(2))
