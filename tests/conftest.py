"""What the tests share: a generated data set, small models and the command line."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets.shapes import write_dataset
from main import get_args_parser

ROOT = Path(__file__).parent.parent

# A model and images so small that a step takes a fraction of a second.
TINY = [
    *("--backbone", "resnet18", "--backbone_weights", "none", "--backbone_norm", "batch"),
    *("--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "64"),
    *("--num_queries", "8", "--min_size", "64", "--max_size", "107", "--batch_size", "4", "--num_workers", "0"),
    *("--device", "cpu"),
]


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A small generated data set, for reading only."""
    root = tmp_path_factory.mktemp("shapes")
    write_dataset(root, num_train=14, num_val=7)
    return root


@pytest.fixture
def parse():
    """Flags to a namespace, on the CPU."""

    def parse(*flags: object) -> argparse.Namespace:
        return get_args_parser().parse_args(["--device", "cpu", *map(str, flags)])

    return parse


@pytest.fixture
def run_main():
    """Runs main.py as a user would and returns the finished process."""

    def run(*flags: object, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *launcher, str(ROOT / "main.py"), *map(str, flags)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            timeout=300,
            check=False,
        )

    return run
