"""scripts/gpu_check.sh, with a stand-in for Python that claims to see a GPU and records its commands."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def check(tmp_path):
    """Run the script; the stand-in exits with `code`, 124 for a timeout, if a command contains `fails`."""

    def check(fails: str = "nothing", code: int = 1) -> tuple[subprocess.CompletedProcess, list[str]]:
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/commands.txt\n[ "$1" = - ] && exec {sys.executable} "$@"\n'
            f'case "$*" in *"{fails}"*) exit {code};; esac\n'
        )
        python.chmod(0o755)
        command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
        env = os.environ | {"PYTHON": str(python)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
        return done, (tmp_path / "commands.txt").read_text().splitlines()

    return check


def test_the_script_runs_the_tests_and_makes_the_tables(check, tmp_path):
    done, commands = check()
    assert done.returncode == 0, done.stderr
    parts = [line.split(":") for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()]
    assert [name for name, _ in parts] == ["tests", "inference", "training", "groups", "training_dc5", "compiled"]
    assert all(outcome.startswith(" ok, ") for _, outcome in parts)
    (tests,) = (line for line in commands if "-m pytest" in line)
    assert "-m gpu" in tests and "tests/test_gpu.py" in tests and "tests/test_step_guard.py" in tests
    assert all((tmp_path / "out" / f"{name}.txt").exists() for name, _ in parts)


@pytest.mark.parametrize(("code", "outcome"), [(1, "training: failed"), (124, "training: cut off after")])
def test_a_part_that_does_not_succeed_is_named(code, outcome, check):
    done, commands = check("training.json", code)
    assert done.returncode == 1
    assert outcome in done.stdout
    assert "compiled.json" in commands[-1]  # the parts after it still run


def test_a_missing_gpu_is_one_line(check):
    done, _ = check("torch.cuda.is_available")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("torch sees no GPU")
    assert "Traceback" not in done.stderr


def test_a_missing_python_is_one_line(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": "absent"}, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: absent cannot be run: set PYTHON to an interpreter"
