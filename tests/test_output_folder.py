"""An output folder belongs to one run at a time and keeps no temporary files, even if processes are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from run import output_folder
from run.output_folder import FolderLock
from tests.conftest import ROOT, flags, log_lines, train
from util.files import remove_leftovers, replacing

pytestmark = pytest.mark.usefixtures("narrow")

# A program that opens a file with `replacing`, writes to it, and waits for a line of input.
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from util.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"new")
    file.flush()
    print("writing", flush=True)
    input()
"""


@pytest.fixture
def start():
    """Start Python in the background; processes that still run at the end of the test are killed."""
    with ExitStack() as stack:

        def start(*command: object, **env: str) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            )
            stack.callback(kill_family, process.pid)
            return process

        yield start


def kill_family(leader: int) -> None:
    for process in family(leader):
        os.kill(process, signal.SIGKILL)


def family(leader: int) -> set[int]:
    """Return a process and its descendants."""
    parents = {pid: parent for pid, parent, _ in processes()}
    found = {leader} & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield the id, parent and state of every living process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            yield int(folder.name), int(parent), state


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    for _ in range(2_000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail("the expected condition was never met")


def test_a_second_run_in_a_folder_is_refused_and_names_the_first(shapes, tmp_path, run_main):
    """The second run changes nothing. An evaluation may use the folder of a training run."""
    train(shapes, tmp_path, "--epochs", 1)
    lock = FolderLock(tmp_path / output_folder.TRAINING_LOCK)
    lock.acquire()
    # The lock is left out: closing any handle of its file would release it.
    before = {path: path.read_bytes() for path in tmp_path.rglob("[a-z]*") if path.is_file()}
    second = run_main(*flags(shapes, "--output_dir", tmp_path, "--epochs", 2, "--resume", "auto"))
    lock.check()
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"error: --output_dir {tmp_path}: in use by process {os.getpid()} on ")
    assert " since 20" in line
    assert "pytest" in line
    assert line.endswith("; end that run, or name another folder")
    evaluation = run_main(*flags(shapes, "--output_dir", tmp_path, "--eval", "--resume", tmp_path / "checkpoint.pth"))
    assert evaluation.returncode == 0, evaluation.stderr
    assert (tmp_path / "eval.pth").exists()
    assert before == {path: path.read_bytes() for path in before}
    lock.release()
    assert not list(tmp_path.glob(".*"))


def test_a_restarted_run_waits_until_the_killed_one_is_gone(shapes, tmp_path, start):
    """The data-loading workers of the killed run do not keep the folder locked, even if they are suspended."""
    first = start(ROOT / "main.py", *flags(shapes, "--output_dir", tmp_path, "--epochs", 1000, "--num_workers", 1))
    wait_for((tmp_path / "checkpoint.pth").exists, first)
    more = ("--epochs", 1001, "--resume", "auto")
    second = start(ROOT / "main.py", *flags(shapes, "--output_dir", tmp_path, *more), TORCHELASTIC_RESTART_COUNT="1")
    line = second.stdout.readline()
    assert f"in use by process {first.pid} on " in line
    assert "waiting up to 60 seconds for it to end" in line
    workers = family(first.pid) - {first.pid}
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    first.kill()
    assert f"loading {tmp_path / 'checkpoint.pth'}" in second.stdout.readline()
    states = {process: state for process, _, state in processes() if process in workers}
    assert list(states.values()) == ["T"] * len(workers)
    assert states
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("env", "restarted"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, True),
    ],
)
def test_a_restarted_run_is_recognised_by_its_environment(env, restarted, monkeypatch):
    for name in (*output_folder.RESTART_COUNTS, *output_folder.JOBS):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert output_folder.is_restarted() == restarted


def test_processes_end_with_their_launcher(shapes, tmp_path, start, monkeypatch):
    """Both ranks and their data-loading workers end, and the run can be resumed in the same folder at once."""
    monkeypatch.undo()  # the launcher's processes do not have the narrow model
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py")
    more = ("--batch_size", 2, "--save_every", 1, "--num_workers", 1)
    first = start(*launcher, *flags(shapes, "--output_dir", tmp_path, "--epochs", 1000, *more))
    wait_for((tmp_path / "log.txt").exists, first)
    wait_for(lambda: len(family(first.pid)) == 7, first)  # launcher, two ranks, two workers each
    started = family(first.pid)
    first.kill()
    wait_for(lambda: not started & {process for process, *_ in processes()})
    train(shapes, tmp_path, "--epochs", log_lines(tmp_path)[-1]["epoch"] + 2, "--batch_size", 4, "--resume", "auto")


def test_only_temporary_files_of_dead_processes_are_removed(tmp_path, start):
    path = tmp_path / "file"
    path.write_text("old")
    code = WRITER.format(root=str(ROOT))
    dead, living, finished = (start("-c", code, path) for _ in range(3))
    for process in (dead, living, finished):
        assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.glob(".*"))) == 3
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.glob(".*"))) == 3
    finished.communicate("\n")
    dead.kill()
    dead.wait()
    (tmp_path / ".hidden.tmp").write_text("not ours")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    assert (tmp_path / ".hidden.tmp").exists()
    living.kill()
    living.wait()
    with replacing(path) as file:
        file.write(b"newer")
    assert path.read_text() == "newer"
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".hidden.tmp"}


def test_a_run_removes_temporary_files_of_a_killed_run(shapes, tmp_path, start):
    for folder in (tmp_path, tmp_path / "eval"):
        folder.mkdir(exist_ok=True)
        (folder / ".latest.pth.0123abcd.tmp").write_text("half")
    train(shapes, tmp_path, "--epochs", 1)
    assert not list(tmp_path.rglob("*.tmp"))
