"""Signals and Ctrl-C end a process with their exit codes, and are never taken for a damaged file."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision

import main
from tests import forked
from tests.conftest import ROOT, TINY, assert_same_end, log_lines
from tests.narrow import narrowed
from util.preemption import EXIT_CODE

pytestmark = pytest.mark.usefixtures("narrow")


def run_code(code: str, *flags: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=120,
        check=False,
    )


@pytest.fixture
def struck(tmp_path_factory):
    """Run main.py with a signal at a moment of `killed.CALLS`, or without one if the moment is ""."""

    def struck(moment: str, name: str, *flags: object, **env: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("printed")
        return forked.run_main(list(map(str, flags)), folder, moment, int(getattr(signal, name)), **env)

    return struck


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    flags = (*TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", output)
    with narrowed():
        main.main(main.get_args_parser().parse_args([*map(str, flags)]))
    return output


@pytest.mark.parametrize(
    ("name", "moment", "flags"),
    [
        ("SIGTERM", "a file of weights is read", ("--eval", "--resume", "CHECKPOINT")),
        ("SIGUSR1", "a file of weights is read", ("--epochs", 2, "--resume", "auto")),
        ("SIGTERM", "a file of weights is read", ("--epochs", 1, "--finetune", "CHECKPOINT", "--output_dir", "NEW")),
        (
            "SIGINT",
            "a file of weights is read",
            ("--epochs", 1, "--backbone_weights", "BACKBONE", "--output_dir", "NEW"),
        ),
        ("SIGTERM", "the first image is decoded", ("--eval", "--resume", "CHECKPOINT", "--on_bad_image", "skip")),
    ],
    ids=["eval", "resume", "finetune", "backbone", "image"],
)
def test_a_signal_while_a_file_is_read_is_not_taken_for_damage(name, moment, flags, shapes, trained, tmp_path, struck):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    paths = {"CHECKPOINT": trained / "checkpoint.pth", "BACKBONE": tmp_path / "resnet18.pth", "NEW": tmp_path / "new"}
    flags = [paths.get(flag, flag) for flag in ("--output_dir", trained, *flags)]
    done = struck(moment, name, *TINY, "--coco_path", shapes, *flags)
    assert done.returncode == (130 if name == "SIGINT" else EXIT_CODE), done.stderr
    printed = done.stdout + done.stderr
    assert all(word not in printed for word in ("damaged", "skipped", "cannot be", "Traceback", "Error"))


def test_a_signal_while_training_images_are_read_ends_the_run_after_the_step(shapes, tmp_path, struck):
    """The step uses all its images, and the resumed run ends like one without a signal."""
    more = ("--ema_decay", 0.8, "--on_bad_image", "skip", "--resume", "auto")
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, *more]
    done = struck("the second image is decoded", "SIGTERM", *flags, "--output_dir", tmp_path / "struck")
    assert done.returncode == EXIT_CODE, done.stderr
    assert "could not be read" not in done.stdout
    for name in ("struck", "whole"):
        assert struck("", "SIGTERM", *flags, "--output_dir", tmp_path / name).returncode == 0
    assert_same_end(tmp_path / "struck", tmp_path / "whole")


def test_ctrl_c_finishes_the_step_and_saves(shapes, tmp_path, struck):
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path, "--num_workers", 1]
    done = struck("the first losses are computed", "SIGINT", *flags)
    assert done.returncode == 130, done.stderr
    assert "Ctrl-C: finishing this step; press it again to stop at once" in done.stderr
    assert "to resume, repeat the command with --resume auto" in done.stdout
    assert "Traceback" not in done.stderr
    step = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"]
    assert step in (1, 2)  # all processes learn of it in the following step


def test_the_second_ctrl_c_ends_at_once(shapes, tmp_path, struck):
    flags = [*TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path, "--num_workers", 1]
    done = struck(
        "the losses of the first and the second batch are computed",
        "SIGINT",
        *(*flags, "--batch_size", 1, "--accum_steps", 6),
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_run_without_an_output_folder_says_that_it_cannot_be_resumed(shapes, struck):
    done = struck("the first losses are computed", "SIGINT", *TINY, "--coco_path", shapes, "--epochs", 1)
    assert done.returncode == 130
    assert "nothing will be saved, and the run cannot be resumed: name a folder with --output_dir" in done.stdout
    assert "nothing was saved: there is no --output_dir" in done.stdout
    assert "--resume auto" not in done.stdout


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_tools_that_are_stopped_print_one_line(name, code, shapes, tmp_path):
    program = f"""
from scripts import check_data
from tests.killed import strike_at
from util.command import run_command
strike_at("the first image is decoded", {int(getattr(signal, name))})
run_command(check_data.main)
"""
    done = run_code(program, "--coco_path", shapes, "--output_dir", tmp_path)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}"


# Sends the process a signal when it imports torch. Python runs this code at its start, from sitecustomize.py.
STRIKE_AT_IMPORT = """
import os, sys
class Strike:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), int(os.environ["STRIKE_WITH"]))
sys.meta_path.insert(0, Strike())
"""


@pytest.mark.parametrize(
    ("command", "name", "code"),
    [
        (["main.py"], "SIGTERM", EXIT_CODE),
        (["main.py"], "SIGINT", 130),
        (["-m", "scripts.convert", "a.pth", "b.pth", "--to", "checkpoint"], "SIGINT", 130),
        (["-m", "scripts.convert", "a.pth", "b.pth", "--to", "checkpoint"], "SIGTERM", 143),
    ],
)
def test_signals_while_modules_are_imported_print_one_line(command, name, code, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STRIKE_AT_IMPORT)
    strike = {"PYTHONPATH": str(tmp_path), "STRIKE_WITH": str(int(getattr(signal, name)))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ | strike, check=False
    )
    assert done.returncode == code
    assert done.stderr == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}\n"


@pytest.mark.parametrize(
    ("moment", "logged"),
    [
        ("the first evaluation is scored", 0),
        ("the second evaluation is scored", 1),
        ("the second line of the log is written", 2),  # no epoch is left: the run ends as usual
        ("workers are ended after the run", 2),
        ("the process group is left after the run", 2),
    ],
)
def test_the_exit_code_after_a_signal_tells_if_all_epochs_are_in_the_log(moment, logged, shapes, tmp_path, struck):
    """The signals come near the end of the run."""
    flags = [*TINY, "--coco_path", shapes, "--epochs", 2, "--output_dir", tmp_path, "--num_workers", 1]
    done = struck(moment, "SIGTERM", *flags)
    assert done.returncode == (0 if logged == 2 else EXIT_CODE), done.stderr
    assert len(log_lines(tmp_path) if (tmp_path / "log.txt").exists() else []) == logged
    assert "Traceback" not in done.stderr
    assert ("ended on request" in done.stdout) == (logged < 2)


def test_an_error_that_a_signal_causes_is_reported_as_the_signal(shapes, tmp_path):
    """C++ code that calls Python may replace an exception by another one."""
    code = """
import os, signal, main
def build_model(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise ImportError("initialization failed")
main.build_model = build_model
main.run()
"""
    done = run_code(code, *TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path)
    assert done.returncode == EXIT_CODE
    assert done.stderr == "stopped by SIGTERM\n"


def test_a_signal_whose_exception_python_drops_still_ends_the_process():
    """Python prints and drops an exception that is raised in `__del__`."""
    code = """
import os, signal, time
from util.preemption import stop_request
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
stop_request.install(75)
Lost()
time.sleep(100)
"""
    assert run_code(code).returncode == EXIT_CODE


def test_ctrl_c_ends_a_process_that_waits_for_another(shapes, tmp_path, meeting):
    """It waits in C++ code, during which Python runs no signal handlers."""
    code = """
import os, signal, threading, torch
meet = torch.distributed.rendezvous
def meet_and_strike(*args, **kwargs):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return meet(*args, **kwargs)
torch.distributed.rendezvous = meet_and_strike
import main
main.run()
"""
    alone = {"RANK": "0", "WORLD_SIZE": "2", **meeting()}
    done = run_code(code, *TINY, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path, **alone)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "stopped at once\n"


def test_all_processes_stop_if_one_receives_a_signal(shapes, tmp_path, run_on_two):
    flags = [*TINY, "--batch_size", 1, "--coco_path", shapes, "--epochs", 1, "--output_dir", tmp_path]
    strikes = [("", "SIGINT"), ("the first losses are computed", "SIGINT")]
    first, second = run_on_two(*flags, strikes=strikes)
    assert (first.returncode, second.returncode) == (130, 130), first.stdout + first.stderr + second.stderr
    assert "ended on request (exit code 130); to resume, repeat the command with --resume auto" in first.stdout
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] in (1, 2)


def test_a_process_that_stops_earlier_does_not_make_the_other_fail(shapes, tmp_path, run_on_two):
    """One gets the signal in the evaluation and ends at once; the other gets it later, before its next step."""
    flags = [*TINY, "--coco_path", shapes, "--batch_size", 1, "--epochs", 2, "--output_dir", tmp_path]
    strikes = [("the first line of the log is written", "SIGTERM"), ("the first evaluation is scored", "SIGTERM")]
    first, second = run_on_two(*flags, strikes=strikes)
    assert (first.returncode, second.returncode) == (EXIT_CODE, EXIT_CODE), first.stdout + first.stderr + second.stderr
    assert "another process of this run has died or stopped" not in first.stdout + first.stderr


@pytest.mark.slow
def test_signals_at_random_moments_are_never_lost(shapes, tmp_path):
    """The exit code is 75 or 130, depending on the signal, and 0 only if the run had finished."""
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
        time.sleep(rng.uniform(0.5, duration))
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
