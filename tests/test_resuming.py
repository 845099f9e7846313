"""Resumed runs: their state, flags, log and best checkpoint."""

import shutil

import pytest
import torch

import main
import training
from tests.conftest import flags, log_lines, train
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def scores(monkeypatch):
    """Make evaluations return the given APs, one after the other."""

    def scores(*aps: float, kind: str = "coco_eval_bbox") -> None:
        left = iter(aps)

        def evaluate(*args, original=main.evaluate, **kwargs):
            stats, evaluator = original(*args, **kwargs)
            stats[kind][0] = next(left)
            return stats, evaluator

        monkeypatch.setattr(main, "evaluate", evaluate)

    return scores


@pytest.mark.parametrize(("aps", "best"), [((0.1, 0.3, 0.3, 0.2), 1), ((-1, 0.0), 1)])
def test_the_first_of_the_highest_aps_is_the_best(aps, best, shapes, tmp_path, scores):
    """COCO's AP of data without ground truth is -1. The run is resumed before its last epoch."""
    scores(*aps)
    train(shapes, tmp_path, "--epochs", len(aps) - 1)
    train(shapes, tmp_path, "--epochs", len(aps), "--resume", "auto")
    checkpoint = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["ap"]) == (best, aps[best])


def test_the_best_checkpoint_of_a_model_with_masks_has_the_highest_mask_ap(shapes, tmp_path, scores, capsys):
    """Mask AP also counts after the run is resumed, and for --patience. The box AP of a frozen detector is constant."""
    train(shapes, tmp_path / "boxes", "--epochs", 1)
    flags = ("--masks", "--frozen_weights", tmp_path / "boxes" / "checkpoint.pth", "--patience", 2, "--resume", "auto")
    scores(0.1, 0.2, 0.4, 0.3, 0.4, kind="coco_eval_masks")
    for epochs in (2, 9):
        train(shapes, tmp_path / "masks", "--epochs", epochs, *flags)
    printed = capsys.readouterr().out
    assert "without a better mask AP than 0.400" in printed
    assert "best mask AP on val: 0.400, in epoch 2" in printed
    checkpoint = torch.load(tmp_path / "masks" / "checkpoint_best.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["ap"]) == (2, 0.4)


def test_a_best_epoch_that_is_interrupted_before_its_log_line_counts_once(shapes, tmp_path, scores, monkeypatch):
    """The resumed run evaluates it again."""

    def interrupted(path, entry, original=training.append_log):
        if entry["epoch"] == 1:
            raise KeyboardInterrupt
        original(path, entry)

    scores(0.1, 0.3, 0.3, 0.3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "append_log", interrupted)
        train(shapes, tmp_path, "--epochs", 3)
    before = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    train(shapes, tmp_path, "--epochs", 3, "--resume", "auto")
    after = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert before["epoch"] == after["epoch"] == 1
    assert all(torch.equal(before["model"][key], value) for key, value in after["model"].items())


@pytest.mark.parametrize("stopped_after", [1, 3, None])
def test_patience_ends_a_run_without_a_better_ap(stopped_after, shapes, tmp_path, scores, capsys):
    """The run ends after two evaluations without a better AP, also if it is resumed between or after them."""
    scores(0.1, 0.3, 0.3, 0.2, 0.4)
    patience = ("--patience", 2, "--resume", "auto")
    if stopped_after:
        train(shapes, tmp_path, "--epochs", stopped_after, *patience)
    for _ in range(2):
        train(shapes, tmp_path, "--epochs", 9, *patience)
        assert "ended early: 2 evaluations without a better AP than 0.300 (--patience 2)" in capsys.readouterr().out
        assert len(log_lines(tmp_path)) == 4
    train(shapes, tmp_path, "--epochs", 5, "--patience", 3, "--resume", "auto")
    assert "ended early" not in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)["epoch"] == 4


def test_patience_needs_no_output_folder(shapes, scores, capsys):
    scores(0.2, 0.1)
    main.main(main.get_args_parser().parse_args(flags(shapes, "--epochs", 9, "--patience", 1)))
    assert "ended early: 1 evaluation without a better AP than 0.200" in capsys.readouterr().out


def test_a_resumed_run_ends_like_one_that_was_never_interrupted(shapes, trained, tmp_path, capsys):
    common = ("--lr_drop", 2, "--dropout", 0, "--resume", "auto", "--num_workers", 1)
    train(shapes, tmp_path, "--epochs", 1, *common)
    assert "starting a new run" in capsys.readouterr().out
    train(shapes, tmp_path, "--epochs", 3, *common)
    assert f"loading {tmp_path / 'checkpoint.pth'}, 1 epoch trained" in capsys.readouterr().out
    ours, theirs = (torch.load(p / "checkpoint.pth", weights_only=True)["model"] for p in (tmp_path, trained))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log_lines(tmp_path) == log_lines(trained)
    train(shapes, tmp_path, "--epochs", 3, *common)
    assert "finished" in capsys.readouterr().out
    assert log_lines(tmp_path) == log_lines(trained)


def test_resuming_from_an_earlier_checkpoint_drops_later_log_lines(shapes, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    resume = trained / "checkpoint0001.pth"
    train(shapes, tmp_path / "run", "--epochs", 3, "--dropout", 0, "--lr_drop", 3, "--resume", resume)
    printed = capsys.readouterr().out
    assert "dropped 1 line of epoch 2 and later" in printed
    assert "--lr_drop is 3 now, 2 in the checkpoint" in printed
    lines = log_lines(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[2]["train_lr"] == pytest.approx(1e-4)


def test_resuming_a_model_without_training_state_starts_at_epoch_0(shapes, trained, tmp_path, capsys):
    model = torch.load(trained / "checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": model}, tmp_path / "model.pth")
    train(shapes, tmp_path, "--epochs", 1, "--resume", tmp_path / "model.pth")
    assert "no state of the training" in capsys.readouterr().out
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0]


def test_start_epoch_needs_no_checkpoint(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 3, "--start_epoch", 2, "--lr_drop", 2)
    (line,) = log_lines(tmp_path)
    assert (line["epoch"], line["train_lr"]) == (2, pytest.approx(1e-5))


def test_flags_of_the_model_come_from_the_checkpoint(shapes, trained, tmp_path, run_main):
    """Neither evaluation nor resuming needs them; a flag that contradicts the checkpoint is refused."""
    data = ("--coco_path", shapes, "--device", "cpu", "--num_workers", 0)
    done = run_main(*data, "--eval", "--resume", trained / "checkpoint.pth")
    assert done.returncode == 0, done.stderr
    assert "--backbone resnet18" in done.stdout and "--min_size 64" in done.stdout
    assert f"= {max(line['test_coco_eval_bbox'][0] for line in log_lines(trained)[-1:]):.3f}" in done.stdout

    shutil.copytree(trained, tmp_path / "run")
    recipe = ("--backbone_weights", "none", "--min_size", 64, "--max_size", 107, "--batch_size", 4)
    done = run_main(*data, *recipe, "--resume", "auto", "--output_dir", tmp_path / "run", "--epochs", 4)
    assert done.returncode == 0, done.stderr
    assert len(log_lines(tmp_path / "run")) == 4

    done = run_main(*data, "--eval", "--resume", trained / "checkpoint.pth", "--backbone", "resnet50")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "is of another model: --backbone is resnet50 now, resnet18 in the checkpoint; drop the flag" in line


def test_a_checkpoint_of_another_model_is_refused(shapes, trained):
    resume = ("--eval", "--resume", trained / "checkpoint.pth")
    for more, message in (
        (("--nheads", 4), "--nheads is 4 now, 2 in the checkpoint"),
        (("--num_classes", 9), "--num_classes 9 contradicts the 4 classes"),
    ):
        with pytest.raises(InputError, match=message):
            main.main(main.get_args_parser().parse_args(flags(shapes, *resume, *more)))


def test_a_new_run_does_not_overwrite_another(shapes, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds the checkpoints of a run: continue it with --resume auto, or name"):
        train(shapes, tmp_path / "run", "--epochs", 1)
    assert log_lines(tmp_path / "run") == log_lines(trained)


def test_imagenet_weights_are_downloaded_only_for_a_new_run(shapes, trained, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    imagenet = ("--backbone_weights", "imagenet")
    with pytest.raises(InputError, match=r"resnet18-f37072fd.pth could not be downloaded \(offline\)"):
        train(shapes, tmp_path, "--epochs", 1, *imagenet)
    main.main(main.get_args_parser().parse_args(flags(shapes, "--eval", *imagenet)))
    resume = ("--resume", trained / "checkpoint.pth")
    with pytest.raises(InputError, match="--backbone_weights none"):  # it would train other parameters
        train(shapes, tmp_path, "--epochs", 4, *imagenet, *resume)
