"""Environment variables of launchers that are missing, not numbers, or contradict each other: one line names them."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from util import distributed
from util.distributed import first_slurm_node, init_distributed_mode, is_first_of_node
from util.errors import InputError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "localhost"}
WRONG = [
    *((TORCHRUN, name, text) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") for text in ("abc", "")),
    *((TORCHRUN, name, text) for name in ("RANK", "LOCAL_RANK") for text in ("-1", "1.0", "9" * 5000)),
    *((TORCHRUN, "WORLD_SIZE", "0"), (TORCHRUN, "RANK", "2"), (TORCHRUN, "MASTER_PORT", "65536")),
    *((TORCHRUN, name, None) for name in ("MASTER_ADDR", "MASTER_PORT")),
    *((SRUN, name, text) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") for text in ("x", "")),
    *((SRUN, "SLURM_LOCALID", "x"), (SRUN, "SLURM_JOB_ID", "x"), (SRUN, "SLURM_PROCID", "2")),
    *((SRUN, name, None) for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST")),
    *((SRUN, "SLURM_STEP_NODELIST", text) for text in ("", "[1-2]")),
]


@pytest.fixture
def environment(monkeypatch):
    """Unset the variables of torchrun, and return a function that sets others."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables: dict[str, str]) -> None:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)

    return set_variables


@pytest.mark.parametrize(("launcher", "name", "text"), WRONG, ids=lambda value: str(value)[:12])
def test_wrong_variables_are_named(launcher, name, text, environment, parse, monkeypatch):
    args = parse()
    environment(launcher if text is None else launcher | {name: text})
    if text is None:
        monkeypatch.delenv(name)
    with pytest.raises(
        InputError, match=rf"^the environment variable {name} is .*(launcher|; torchrun and srun set it)"
    ):
        init_distributed_mode(args)


def test_the_line_says_which_values_are_possible(environment, parse):
    environment(TORCHRUN | {"RANK": "2"})
    with pytest.raises(InputError, match=r"RANK is 2: must be below WORLD_SIZE, which is 2, since .* counted from 0;"):
        init_distributed_mode(parse())
    environment({"LOCAL_RANK": "x"})
    with pytest.raises(InputError, match="LOCAL_RANK is 'x': must be an integer between 0 and 1000000; torchrun and"):
        is_first_of_node()  # predict calls it to download a checkpoint


@pytest.mark.parametrize(
    ("variables", "flags"),
    [({"RANK": "abc", "WORLD_SIZE": "2"}, ()), ({"LOCAL_WORLD_SIZE": "0"}, ("--num_workers", "auto"))],
)
def test_main_prints_one_line_for_wrong_variables(variables, flags, shapes):
    command = [sys.executable, ROOT / "main.py", "--coco_path", shapes, *flags, "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"the environment variable {next(iter(variables))} is " in line


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],login1", "gpu03"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("r1-n[2,4]", "r1-n2"),
        ("x.y.org", "x.y.org"),
    ],
)
def test_the_first_node_is_read_from_slurms_list(nodes, first):
    assert first_slurm_node(nodes) == first


def test_the_tasks_of_srun_meet_at_the_first_node(environment, parse, monkeypatch):
    """The port follows from the number of the job."""
    asked = []
    monkeypatch.setattr(distributed, "join_process_group", lambda args, on_cuda: asked.append(dict(os.environ)))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
        monkeypatch.delenv(name)
    environment(SRUN | {"SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "1234567"})
    init_distributed_mode(parse())
    assert (asked[0]["MASTER_ADDR"], asked[0]["MASTER_PORT"]) == ("gpu07", str(20_000 + 1234567 % 20_000))
