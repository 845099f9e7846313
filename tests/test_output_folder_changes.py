"""Output folders that change or fail during a run, or that contain folders and pipes in the place of files."""

import fcntl
import json
import os
import shutil

import pytest
import torch

import main
import training
from run import output_folder
from tests.conftest import log_lines, train
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def during_evaluation(monkeypatch):
    """Call a function, which changes the output folder, at the end of each evaluation."""

    def during_evaluation(change):
        def evaluate(*args, original=main.evaluate):
            result = original(*args)
            change()
            return result

        monkeypatch.setattr(main, "evaluate", evaluate)

    return during_evaluation


@pytest.mark.parametrize("tensorboard", [(), ("--tensorboard",)], ids=["plain", "tensorboard"])
def test_a_folder_that_is_deleted_ends_the_run(tensorboard, shapes, tmp_path, during_evaluation, capfd):
    output = tmp_path / "run"
    during_evaluation(lambda: shutil.rmtree(output))
    with pytest.raises(InputError, match=f"^--output_dir {output}: was deleted during the run; nothing more is saved"):
        train(shapes, output, "--epochs", 3, *tensorboard)
    assert not output.exists()
    assert capfd.readouterr().err == ""


def test_a_folder_that_another_run_has_recreated_is_left_to_it(shapes, tmp_path, during_evaluation):
    output = tmp_path / "run"

    def recreate() -> None:
        shutil.rmtree(output)
        output.mkdir()
        (output / output_folder.TRAINING_LOCK).write_text("process 7 on host")

    during_evaluation(recreate)
    with pytest.raises(InputError, match="was deleted during the run and is in use by process 7 on host; nothing more"):
        train(shapes, output, "--epochs", 3)
    assert [path.name for path in output.iterdir()] == [output_folder.TRAINING_LOCK]


def test_a_full_disk_ends_in_one_line_with_tensorboard(shapes, tmp_path, during_evaluation, monkeypatch, capfd):
    """Writing fails in a thread of TensorBoard."""
    pytest.importorskip("tensorboard")
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*_):
        raise OSError(28, "No space left on device")

    during_evaluation(lambda: monkeypatch.setattr(gfile.LocalFileSystem, "append", full))
    with pytest.raises(InputError, match=r"run/tensorboard: cannot be written \(\[Errno 28\] No space left on device"):
        train(shapes, tmp_path / "run", "--epochs", 3, "--tensorboard")
    assert capfd.readouterr().err == ""


def test_folders_in_the_place_of_files_and_a_pipe_in_that_of_a_folder_are_refused(shapes, tmp_path):
    for name in ("checkpoint_best.pth", "log.txt"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"{name}: is a folder, not a file; move it elsewhere"):
            train(shapes, tmp_path, "--epochs", 1)
        (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / "eval")
    with pytest.raises(InputError, match="eval: is a named pipe, not a folder; move it elsewhere"):
        train(shapes, tmp_path, "--epochs", 1)
    assert not list(tmp_path.glob(".*"))


def test_named_pipes_in_the_place_of_files_are_replaced(shapes, tmp_path, capsys):
    """Nothing is lost, because a pipe stores no data."""
    train(shapes, tmp_path, "--epochs", 1)
    before = log_lines(tmp_path)
    (tmp_path / "checkpoint.pth").replace(tmp_path / "checkpoint_previous.pth")
    for name in ("log.txt", "checkpoint_best.pth", "eval/latest.pth"):
        (tmp_path / name).unlink()
    for name in ("log.txt", "checkpoint.pth", "checkpoint_best.pth", "eval/latest.pth"):
        os.mkfifo(tmp_path / name)
    train(shapes, tmp_path, "--epochs", 2, "--resume", "auto")
    printed = capsys.readouterr().out
    assert f"warning: {tmp_path}/checkpoint.pth: is a named pipe, not a file; trying an earlier one" in printed
    assert f"warning: {tmp_path}/log.txt: is a named pipe, not a file; a new log takes its place" in printed
    assert log_lines(tmp_path)[0] == before[0]
    assert all(path.is_file() or path.is_dir() for path in tmp_path.rglob("*"))
    json.loads((tmp_path / "log.txt").read_text().splitlines()[1])


def test_a_file_system_without_locks_gives_one_warning(shapes, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    train(shapes, tmp_path, "--epochs", 1)
    expected = f"warning: --output_dir {tmp_path}: its file system has no locks (No locks available); make sure that"
    assert capsys.readouterr().out.count(expected) == 1
    assert {path.name for path in tmp_path.glob("*.pth")} >= {"checkpoint.pth", "checkpoint_best.pth"}


def test_a_resumed_run_writes_a_numbered_checkpoint_that_was_interrupted(shapes, tmp_path, monkeypatch):
    def interrupted(checkpoint, path, original=training.save_on_master, **kwargs):
        if path.name == "checkpoint0000.pth":
            raise KeyboardInterrupt
        original(checkpoint, path, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_on_master", interrupted)
        train(shapes, tmp_path, "--epochs", 2, "--lr_drop", 1)
    train(shapes, tmp_path, "--epochs", 2, "--lr_drop", 1, "--resume", "auto")
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]
    train(shapes, tmp_path / "whole", "--epochs", 2, "--lr_drop", 1)
    for name in ("checkpoint0000.pth", "checkpoint0001.pth"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path, tmp_path / "whole"))
        assert ours["epoch"] == theirs["epoch"]
        assert ours["processes"] == theirs["processes"]
        assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
