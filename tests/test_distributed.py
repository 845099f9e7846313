"""Runs on several processes: they work with every launcher, and give the results of one process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from models import build_model
from tests import two_processes
from tests.conftest import ROOT, TINY, assert_same_end, log_lines
from tests.forked import run_on_several
from tests.killed import STRUCK
from util.distributed import distribute
from util.preemption import EXIT_CODE

MODULE = "torch.distributed.run"


def flags(shapes, output, *more: object) -> list[str]:
    return [*TINY, "--coco_path", str(shapes), "--output_dir", str(output), *map(str, more)]


@pytest.fixture
def start():
    """Start Python in the background; processes that still run at the end of the test are killed."""
    with ExitStack() as stack:

        def start(*command: object, cwd: Path = ROOT, **env: object) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in env.items()},
                start_new_session=True,
            )
            stack.callback(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
            return process

        yield start


@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"),
        ("-m", "torch.distributed.launch", "--standalone", "--use_env", "--nproc_per_node=2"),
    ],
    ids=["launch", "launch-use_env"],
)
def test_torch_distributed_launch_starts_both_processes(launcher, shapes, tmp_path, run_main):
    """Other tests use torchrun."""
    done = run_main(*flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 2), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert_trained_together(done.stdout, tmp_path)


def assert_trained_together(printed: str, output) -> None:
    assert "2 images × 2 processes = 4 per step" in printed
    assert printed.count("training took") == 1
    (line,) = log_lines(output)
    assert len(line["test_coco_eval_bbox"]) == 12


def test_two_tasks_of_slurm_train_together(shapes, tmp_path, start, meeting):
    """Set the variables of srun for two tasks, and the address, which tests/test_launcher.py derives from them."""
    job = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NODELIST": "localhost", **meeting()}
    command = (ROOT / "main.py", *flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 2))
    tasks = [start(*command, SLURM_PROCID=rank, SLURM_LOCALID=0, **job) for rank in range(2)]
    printed = "".join(task.communicate(timeout=120)[0] for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert_trained_together(printed, tmp_path)


def test_two_agents_of_torchrun_train_together(shapes, tmp_path, start, meeting):
    """Start one agent per node, as on two nodes; they meet at the address of the first."""
    agent = ("-m", MODULE, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test")
    endpoint = f"--rdzv_endpoint=127.0.0.1:{meeting()['MASTER_PORT']}"
    address = (endpoint, "--rdzv_conf=is_host=0", "--local_addr=127.0.0.1")
    command = (*agent, *address, ROOT / "main.py", *flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 2))
    agents = [start(*command) for _ in range(2)]
    printed = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert_trained_together(printed, tmp_path)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    ("boxes", "more"),
    [((1, 2, 3, 4), ()), ((1, 0, 3, 0), ()), ((1, 2, 3, 4), ("--masks",)), ((1, 0, 3, 0), ("--masks",))],
    ids=["boxes", "no_boxes_on_one_process", "masks", "no_masks_on_one_process"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_a_step_on_two_processes_equals_one_step_of_the_double_batch(device, boxes, more, parse, tmp_path, meeting):
    """Use images of one size, frozen norms and no dropout, with gloo on CPUs and NCCL on GPUs.

    Each process starts with different weights and statistics; those of the first one are used.
    """
    frozen = ("--backbone_norm", "frozen", "--backbone_weights", "x")
    args = parse(*TINY, *frozen, "--dropout", 0, "--num_classes", 4, *more)
    args.device = device
    run_on_several(two_processes.step, (1, {}, args, tmp_path, boxes), 1)
    run_on_several(two_processes.step, (2, meeting(), args, tmp_path, boxes), 2)
    one, first, second = (torch.load(tmp_path / f"{name}.pth", map_location="cpu") for name in ("1-0", "2-0", "2-1"))
    assert first["stats"] == second["stats"]
    for name, value in one["stats"].items():
        if "error" not in name:  # means over images that differ in their number of boxes
            assert first["stats"][name] == pytest.approx(value, rel=1e-6), name
    total = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        assert (first["gradients"][name] - gradient).norm() < 1e-4 * total, name
    for name, value in one["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        assert (first["model"][name] - value).abs().max() < 1e-6, name


def test_evaluation_on_two_processes_counts_every_image_once(shapes, tmp_path, narrow, run_main, run_on_two):
    """Two processes cannot share seven images equally, so that one image is evaluated twice."""
    assert run_main(*flags(shapes, tmp_path, "--epochs", 1)).returncode == 0
    resume = ("--eval", "--resume", tmp_path / "checkpoint.pth", "--batch_size", 1)
    runs = [run_main(*flags(shapes, tmp_path / "one", *resume)), *run_on_two(*flags(shapes, tmp_path / "two", *resume))]
    assert [run.returncode for run in runs] == [0] * 3, runs
    results = []
    for name in ("one", "two"):
        saved = torch.load(tmp_path / name / "eval.pth", weights_only=True)
        assert len(saved["params"]["imgIds"]) == 7
        results.append(saved)
    for key in ("precision", "recall", "scores"):
        assert torch.equal(results[0][key], results[1][key])


def test_models_with_other_outputs_can_be_distributed(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 3)

        def forward(self, images):
            maps = self.layer(images)
            return {"pred_masks": [maps], "memory": {"count": 3, "constant": torch.ones(2)}}

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distribute(Model(), torch.device("cpu"), trained_norms=False, trains=True)
    finally:
        torch.distributed.destroy_process_group()


def test_processes_leave_while_a_tensor_is_sent(parse, meeting):
    """Before torch 2.8, the processes would wait for a thread that waits for them to free the tensor."""
    run_on_several(two_processes.leave_while_sending, (2, meeting(), parse()), 2)


@pytest.mark.parametrize(
    "moment", ["the data is loaded", "the model is distributed", "the training begins", "the evaluation begins"]
)
def test_a_process_that_dies_ends_the_other_with_one_line(moment, shapes, tmp_path, narrow, run_on_two):
    """Start without torchrun, which would end the other process before it can print its line."""
    recipe = flags(shapes, tmp_path, "--epochs", 1, "--batch_size", 2)
    survivor, died = run_on_two(*recipe, strikes=[("", "SIGKILL"), (moment, "SIGKILL")])
    assert (survivor.returncode, died.returncode) == (1, -signal.SIGKILL), survivor.stderr
    printed = survivor.stdout + survivor.stderr
    assert "error: process 0: another process of this run has died or stopped; its own last line says why" in printed
    assert printed.count("another process") == 1
    assert not any(word in printed for word in ("Traceback", "gloo", "pair.cc"))


def test_processes_that_cannot_connect_end_with_one_line(shapes, start):
    """Another program uses the port of the first process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        printed = output_of(start(ROOT / "main.py", *TINY, "--coco_path", shapes, **env), 1)
    assert f"error: process 0 cannot connect to the other processes at 127.0.0.1:{port} (" in printed
    assert "Traceback" not in printed


def test_one_process_replays_a_step_of_two(shapes, tmp_path, start, run_main, run_on_two):
    """Each process writes its own file; the losses of both are divided by their mean number of boxes."""
    checkpoint = tmp_path / "start.pth"
    assert run_main(*flags(shapes, tmp_path / "one", "--epochs", 1)).returncode == 0
    weights = torch.load(tmp_path / "one" / "checkpoint.pth", weights_only=True)
    weights["model"]["bbox_embed.layers.2.bias"][0] = float("nan")
    torch.save({"model": weights["model"], "args": weights["args"]}, checkpoint)
    more = ("--epochs", 1, "--batch_size", 2, "--resume", checkpoint, "--amp", "bf16", "--deterministic")
    assert [run.returncode for run in run_on_two(*flags(shapes, tmp_path / "two", *more))] == [1, 1]
    dumps = sorted((tmp_path / "two").glob("nonfinite-*.pth"))
    assert [path.stem[-8:] for path in dumps] == ["process0", "process1"]
    losses = []
    for path in dumps:
        printed = output_of(start("-m", "scripts.replay", path, "--device", "cpu"))
        assert "all losses equal the recorded ones bit for bit" in printed
        assert "the first module whose output is not finite: bbox_embed.layers.2" in printed
        losses.append(next(line for line in printed.splitlines() if line.startswith("  loss_ce ")))
    assert losses[0] != losses[1]


def test_processes_that_read_different_checkpoints_end_with_one_line(shapes, tmp_path, start, parse, meeting):
    """Imitate nodes on which --output_dir is a local folder."""
    place = meeting()
    model, _, _ = build_model(parse(*TINY, "--num_classes", 4))
    tasks = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        torch.save({"model": model.state_dict(), "epoch": rank, "args": {}}, folder / "checkpoint.pth")
        env = {"RANK": rank, "WORLD_SIZE": 2, **place}
        command = (ROOT / "main.py", *flags(shapes, ".", "--resume", "auto"))
        tasks.append(start(*command, cwd=folder, **env))
    for rank, task in enumerate(tasks):
        printed = output_of(task, 1)
        assert f"error: process {rank}: checkpoint.pth: process 1 reads another file" in printed
        assert "Traceback" not in printed


RECIPE = ("--epochs", 2, "--batch_size", 1, "--dropout", 0.1, "--ema_decay", 0.8, "--save_every", 1)


def killed_run(shapes, output, processes: int, killed_at: str, start, *more: object, **env: object) -> subprocess.Popen:
    """Start two epochs under torchrun, which tests/killed.py interrupts and torchrun restarts."""
    restarts = f"--max-restarts={killed_at.count(':')}"
    launcher = ("-m", MODULE, "--standalone", f"--nproc_per_node={processes}", restarts)
    script = (ROOT / "tests" / "killed.py", *flags(shapes, output, *RECIPE, *more))
    return start(*launcher, *script, KILLED_AT=killed_at, **env)


def output_of_struck(process: subprocess.Popen, moments: Sequence[str], exit_code: int | None = 0) -> str:
    """Return the output of a run, and check that it was struck at these moments."""
    printed = output_of(process, exit_code)
    came = [line.split(STRUCK)[1] for line in printed.splitlines() if STRUCK in line]
    assert came == list(moments), f"{came} came instead of {moments}:\n{printed}"
    return printed


def output_of(process: subprocess.Popen, exit_code: int | None = 0) -> str:
    printed = process.communicate(timeout=400)[0]
    assert exit_code in (None, process.returncode), printed
    return printed


MANY = (
    "0: before checkpoint.pth is in place after step 2; 1: after step 3; 2: before step 1; "
    "0: halfway into checkpoint.pth after step 3; 2: before step 2; "
    "0: after checkpoint_previous.pth is in place after step 1"
)


@pytest.mark.parametrize(
    ("processes", "killed_at"), [(2, "1: after step 6"), pytest.param(3, MANY, marks=pytest.mark.slow)]
)
def test_torchrun_restarts_a_run_whose_process_dies(processes, killed_at, shapes, tmp_path, start, narrow, run_on_two):
    """With three processes, the order in which their gradients are added matters, too."""
    if processes == 2:
        assert all(run.returncode == 0 for run in run_on_two(*flags(shapes, tmp_path / "whole", *RECIPE)))
    else:
        output_of(killed_run(shapes, tmp_path / "whole", processes, "", start))
    moments = [strike.split(": ")[1] for strike in killed_at.split("; ")]
    printed = output_of_struck(killed_run(shapes, tmp_path / "killed", processes, killed_at, start), moments)
    times = killed_at.count(":")
    assert printed.count("failed (exitcode: ") == times  # of the killed process, or of one that lost it
    assert printed.count("loading") == times
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_torchrun_ends_can_be_resumed(shapes, tmp_path, start, narrow, run_main, run_on_two):
    """Processes finish their step and write a checkpoint before torchrun would kill them; fewer can resume it."""
    ended = tmp_path / "ended"
    sigterm = int(signal.SIGTERM)
    run = killed_run(shapes, ended, 2, "1: before step 3", start, KILLED_SIGNAL=sigterm)
    printed = output_of_struck(run, ["before step 3"], None)
    assert f"ended on request (exit code {EXIT_CODE})" in printed
    step = torch.load(ended / "checkpoint.pth", weights_only=True)["step"]
    assert 0 < step < 7
    shutil.copytree(ended, tmp_path / "fewer")

    for folder in (ended, tmp_path / "whole"):
        runs = run_on_two(*flags(shapes, folder, *RECIPE, "--resume", "auto"))
        assert [run.returncode for run in runs] == [0, 0], runs
    assert_same_end(ended, tmp_path / "whole")

    more = ("--epochs", 1, "--batch_size", 2, "--resume", "auto")
    printed = run_main(*flags(shapes, tmp_path / "fewer", *more)).stdout
    assert f"0 epochs trained and {step} steps" in printed
    assert "Epoch [0]  [6/7]" in printed
    assert "Epoch [0]  [0/7]" not in printed


def test_ctrl_c_stops_all_processes_in_the_same_step(shapes, tmp_path, start):
    """torchrun passes Ctrl-C to its processes."""
    sigint = int(signal.SIGINT)
    run = killed_run(shapes, tmp_path, 2, "1: before step 3", start, KILLED_SIGNAL=sigint)
    printed = output_of_struck(run, ["before step 3"], None)
    assert printed.count("Ctrl-C: finishing this step; press it again to stop at once") == 1
    assert printed.count("ended on request (exit code 130); to resume, repeat the command\n") == 1
    assert "another process of this run has died or stopped" not in printed
    assert 0 < torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] < 7
