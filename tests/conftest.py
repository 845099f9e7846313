"""Fixtures and helpers of all tests: a generated data set, small models and the command line."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import main
from datasets.shapes import write_dataset
from scripts import predict
from tests import forked, predicting
from tests.narrow import make_narrow, narrowed

ROOT = Path(__file__).parent.parent

# Generated examples are the same in every run, on a machine of any speed.
checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("reproducible", derandomize=True, deadline=None, suppress_health_check=checks)
settings.load_profile("reproducible")

# A model and images so small that a step takes a fraction of a second.
TINY = [
    *("--backbone", "resnet18", "--backbone_weights", "none", "--backbone_norm", "batch"),
    *("--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "64"),
    *("--num_queries", "8", "--min_size", "64", "--max_size", "107", "--batch_size", "4", "--num_workers", "0"),
    *("--device", "cpu"),
]


def flags(shapes: Path, *more: object) -> list[str]:
    return [*TINY, "--coco_path", str(shapes), *map(str, more)]


def train(shapes: Path, output: Path, *more: object) -> None:
    main.main(main.get_args_parser().parse_args(flags(shapes, "--output_dir", output, *more)))


def log_lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def assert_same_end(output, expected) -> None:
    ours, theirs = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (output, expected))
    best, their_best = (torch.load(folder / "checkpoint_best.pth", weights_only=True) for folder in (output, expected))
    for key in ("epoch", "step", "skipped", "processes", "train_stats"):
        assert ours[key] == theirs[key]
    assert (best["epoch"], best["ap"]) == (their_best["epoch"], their_best["ap"])
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key
        assert torch.equal(best["model"][key], their_best["model"][key]), key
    assert ours.keys() == theirs.keys()
    if "ema" in theirs:
        assert ours["ema"]["steps"] == theirs["ema"]["steps"]
        for key, value in theirs["ema"]["model"].items():
            assert torch.equal(ours["ema"]["model"][key], value), key
    for index, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], value), (index, name)
    assert (output / "log.txt").read_text() == (expected / "log.txt").read_text()
    files, their_files = ({path.name for path in folder.glob("[!.]*.pth")} for folder in (output, expected))
    assert files ^ their_files <= {"checkpoint_previous.pth"}  # an interruption writes one more checkpoint


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests with the mark `gpu` on machines without a GPU."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    """Use one thread if several processes share the tests (pytest-xdist), else two."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small generated data set, which tests only read."""
    root = tmp_path_factory.mktemp("shapes")
    write_dataset(root, num_train=14, num_val=7)
    return root


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of three epochs with a narrow model, which tests only read."""
    output = tmp_path_factory.mktemp("trained")
    with narrowed():
        train(shapes, output, "--epochs", 3, "--lr_drop", 2, "--dropout", 0)
    return output


@pytest.fixture
def narrow(monkeypatch):
    """Make resnet18 so narrow that a model is built, saved and loaded within milliseconds, also in `run_main`."""
    make_narrow(monkeypatch)


@pytest.fixture
def parse():
    """Return a function that parses flags, with the CPU as device by default."""

    def parse(*flags: object) -> argparse.Namespace:
        return main.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)])

    return parse


@pytest.fixture
def meeting():
    """Return a function that starts a store for the rendezvous of processes, and returns its environment variables.

    The store listens until the end of the test, so that no other program can take its port.
    """
    stores = []

    def start_store() -> dict[str, str]:
        stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        port = str(stores[-1].port)
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    yield start_store
    stores.clear()


@pytest.fixture
def run_main(tmp_path_factory):
    """Return a function that runs main.py as a user would, and returns the finished process.

    A new Python is only started for a launcher, another script or variables for Python; forking is faster.
    """

    def run(
        *flags: object, launcher: tuple[str, ...] = (), script: str = "main.py", **env: str
    ) -> subprocess.CompletedProcess:
        if script == "main.py" and not launcher and not any(name.startswith("PYTHON") for name in env):
            return forked.run_main(list(map(str, flags)), tmp_path_factory.mktemp("printed"), **env)
        return subprocess.run(
            [sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def run_on_two(tmp_path_factory, meeting):
    """Return a function that runs main.py on two processes, as a launcher would, and returns both, finished, by rank.

    `strikes` has a moment of `killed.CALLS` and the name of a signal for each process.
    """

    def run(
        *flags: object, strikes: Sequence[tuple[str, str]] = (("", "SIGKILL"),) * 2
    ) -> list[subprocess.CompletedProcess]:
        env = {"WORLD_SIZE": "2", **meeting()}
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(
                    *(forked.run_main, list(map(str, flags)), tmp_path_factory.mktemp("printed")),
                    *(moment, int(getattr(signal, name))),
                    **env | {"RANK": str(rank)},
                )
                for rank, (moment, name) in enumerate(strikes)
            ]
            return [run.result() for run in runs]

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Images for prediction, which tests only read."""
    root = tmp_path_factory.mktemp("photos")
    predicting.write_photos(root)
    return root


@pytest.fixture(scope="session")
def scored_checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a tiny model whose scores are spread over 0 to 1."""
    path = tmp_path_factory.mktemp("scored") / "checkpoint.pth"
    predicting.save_scored_checkpoint(path, TINY)
    return path


@pytest.fixture
def run_predict(scored_checkpoint, tmp_path, capsys):
    """Return a function that predicts with `scored_checkpoint`.

    It returns the exit code, the results by image id, and the printed text.
    """

    def run(*flags: object) -> tuple[int, dict[int | str, list[dict]], str]:
        common = ("--checkpoint", scored_checkpoint, "--device", "cpu", "--output", tmp_path / "out")
        code = predict.main([str(flag) for flag in (*common, *flags)])
        return code, predicting.results_by_image(tmp_path / "out"), capsys.readouterr().out

    return run
