"""Runs of main.py: the files and lines that training writes, evaluation, and mistakes in flags."""

import re
import shlex
import shutil

import pytest
import torch
from PIL import Image

import main
from scripts import demo_pictures
from tests.conftest import flags, log_lines, train
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


def test_the_predictions_of_a_run_are_drawn(trained, tmp_path, capsys):
    """Six images whose long side is 320, each with its ground truth next to the detections."""
    for name in ("checkpoint.pth", "log.txt"):
        shutil.copy(trained / name, tmp_path / name)
    demo_pictures.main(["--output_dir", str(tmp_path), "--threshold", "0"])
    assert f"wrote {tmp_path / 'predictions.png'}\n" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "predictions.png").size
    assert 1000 < width <= 2 * (2 * 320 + 8) + 3 * 8
    assert 600 < height <= 3 * (320 + 32) + 4 * 8


def test_a_run_writes_checkpoints_and_a_log(trained):
    checkpoints = {"checkpoint.pth", "checkpoint_previous.pth", "checkpoint0001.pth", "checkpoint_best.pth"}
    assert {path.name for path in trained.iterdir()} == checkpoints | {"log.txt", "eval"}
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    published = {"model", "optimizer", "lr_scheduler", "epoch", "args"}
    ours = {"class_ids", "class_names", "step", "scaler", "skipped", "processes", "train_stats"}
    assert set(checkpoint) == published | ours
    assert (checkpoint["epoch"], checkpoint["step"], len(checkpoint["processes"])) == (2, 0, 1)
    assert checkpoint["args"]["num_classes"] == 4
    assert checkpoint["class_names"] == {1: "circle", 2: "square", 3: "triangle"}
    assert torch.load(trained / "eval" / "latest.pth", weights_only=True)["precision"].shape == (10, 101, 3, 4, 3)

    lines = log_lines(trained)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["train_lr"] for line in lines] == pytest.approx([1e-4, 1e-4, 1e-5])
    for line in lines:
        assert len(line["test_coco_eval_bbox"]) == 12
        assert line["n_parameters"] > 10_000
        for part in ("train", "test"):
            keys = {key.removeprefix(f"{part}_") for key in line if key.startswith(part)}
            losses = {f"loss_{name}{suffix}" for name in ("ce", "bbox", "giou") for suffix in ("", "_0")}
            errors = {"class_error", "cardinality_error", "cardinality_error_0"}
            assert {"loss", "class_error"} | losses | {f"{key}_unscaled" for key in losses | errors} <= keys
            assert line[f"{part}_loss_bbox"] == pytest.approx(5 * line[f"{part}_loss_bbox_unscaled"], rel=1e-4)


def test_the_best_checkpoint_evaluates_to_the_logged_ap(shapes, trained, tmp_path, run_main):
    """It has all that inference needs, but no state of the optimizer."""
    best = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    assert set(best) == {"model", "epoch", "ap", "args", "class_ids", "class_names"}
    aps = [line["test_coco_eval_bbox"][0] for line in log_lines(trained)]
    assert (best["epoch"], best["ap"]) == (aps.index(max(aps)), max(aps))
    shutil.copy(trained / "checkpoint_best.pth", tmp_path)
    done = run_main(*flags(shapes, "--eval", "--resume", tmp_path / "checkpoint_best.pth", "--output_dir", tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"= {max(aps):.3f}" in done.stdout
    saved = torch.load(tmp_path / "eval.pth", weights_only=True)["precision"][:, :, :, 0, -1]
    assert saved[saved > -1].mean().item() == pytest.approx(max(aps), abs=1e-9)


def test_the_remaining_time_is_printed_before_the_last_epoch(shapes, tmp_path, capsys):
    """Lines of steps estimate it from steps, and a line after each epoch includes the evaluation."""
    train(shapes, tmp_path, "--epochs", 3)
    lines = capsys.readouterr().out.splitlines()
    for epoch in range(3):
        steps = [line for line in lines if line.startswith(f"Epoch [{epoch}]  [")]
        assert steps and all(("(run " in line) == (epoch < 2) for line in steps)
    ends = [line for line in lines if "took" in line and "with evaluation" in line]
    assert [re.search(r"epochs left: (\d), about \d+:\d\d:\d\d$", line)[1] for line in ends] == ["2", "1"]


def test_a_run_ends_with_a_summary_whose_commands_work(shapes, tmp_path, run_main):
    output = tmp_path / "my run"
    done = run_main(*flags(shapes, "--epochs", 2, "--output_dir", output))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines()[-4:])
    aps = [line["test_coco_eval_bbox"][0] for line in log_lines(output)]
    best = output / "checkpoint_best.pth"
    assert lines["best AP on val"] == f"{max(aps):.3f}, in epoch {aps.index(max(aps))}: {best}"
    assert lines["last epoch"] == f"{output / 'checkpoint.pth'}; log: {output / 'log.txt'}"
    assert shlex.split(lines["predict"])[-5:] == ["--checkpoint", str(best), "--output", "predictions", "IMAGES"]
    python, main_file, *evaluate = shlex.split(lines["evaluate"])
    assert (python, main_file) == ("python", "main.py")
    done = run_main(*evaluate)
    assert done.returncode == 0, done.stderr
    assert f"= {max(aps):.3f}" in done.stdout


def test_evaluation_alone_gives_the_same_numbers(shapes, trained, tmp_path, run_main):
    """Evaluate on the command line, with the val files only."""
    val_only = tmp_path / "coco"
    shutil.copytree(shapes / "images" / "val2017", val_only / "val2017")
    (val_only / "annotations").mkdir()
    shutil.copy(shapes / "annotations" / "instances_val2017.json", val_only / "annotations")
    resume = ("--resume", trained / "checkpoint.pth", "--output_dir", tmp_path / "out")
    done = run_main(*flags(val_only, "--eval", *resume))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" Average ") == 12
    assert "7 images" in done.stdout
    saved = torch.load(tmp_path / "out" / "eval.pth", weights_only=True)["precision"][:, :, :, 0, -1]
    assert saved[saved > -1].mean().item() == pytest.approx(log_lines(trained)[-1]["test_coco_eval_bbox"][0], abs=1e-9)


def test_eval_every_evaluates_some_epochs_and_the_last(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 3, "--eval_every", 2)
    assert ["test_loss" in line for line in log_lines(tmp_path)] == [False, True, True]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])  # fp16 is slow on CPUs
def test_amp_changes_the_loss_a_little(amp, shapes, trained, tmp_path):
    common = ("--amp", amp, "--dropout", 0, "--lr_drop", 2, "--resume", "auto")
    for epochs in (1, 2):
        train(shapes, tmp_path, "--epochs", epochs, *common)
    scaler = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["scaler"]
    if amp == "fp16":
        assert 0 < scaler["scale"] < 2**16  # the first steps overflow, which lowers it
    else:
        assert scaler == {}
    for ours, float32 in zip(log_lines(tmp_path), log_lines(trained), strict=False):
        assert ours["train_loss"] == pytest.approx(float32["train_loss"], rel=0.1)
        assert ours["train_loss"] != float32["train_loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--coco_path", "/nowhere"), "--coco_path /nowhere: no such folder"),
        (("--frozen_weights", "x"), "--frozen_weights names the detector for a mask head: add --masks"),
        (("--mask_loss_coef", 2), "--mask_loss_coef 2: only a model with masks has this loss; add --masks"),
        (("--dice_loss_coef", 2), "--dice_loss_coef 2"),
        (("--dataset_file", "coco_panoptic"), "--dataset_file coco_panoptic: no train data"),
        (("--batch_size", 0), "--batch_size 0: must be at least 1"),
        (("--batch_size", 15), "14 images are fewer than a batch of 15"),
        (("--dropout", 1.5), "--dropout 1.5: must be between 0 and 1"),
        (("--device", "tpu0"), "--device tpu0: not a supported device"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU"),
        (("--resume", "absent.pth"), "absent.pth: no such checkpoint"),
        (("--resume", "auto"), "--resume auto looks for checkpoints in --output_dir"),
        (("--num_classes", 3), "category id 3 (triangle) does not fit a model of 3 classes"),
        (("--max_size", 10), "--max_size 10: must be at least --min_size 64"),
        (("--lr", -1), "--lr -1.0: must be at least 0"),
        (("--output_dir", __file__), "test_main.py: cannot be made"),
    ],
)
def test_mistakes_in_flags_are_named(more, message, shapes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        main.main(main.get_args_parser().parse_args(flags(shapes, "--epochs", 1, *more)))
    assert message in str(error.value)


def test_flags_that_would_train_nothing_are_refused(shapes, trained, tmp_path):
    model = {"model": torch.load(trained / "checkpoint.pth", weights_only=True)["model"]}
    torch.save(model, tmp_path / "model.pth")
    for more, message in (
        (("--lr", 0, "--lr_backbone", 0), "--lr 0 with --lr_backbone 0: nothing would be trained"),
        (("--cls_loss_coef", 0, "--bbox_loss_coef", 0, "--giou_loss_coef", 0), "are all 0: nothing would be trained"),
        (("--set_cost_class", 0, "--set_cost_bbox", 0, "--set_cost_giou", 0), "cannot all be 0"),
        (("--accum_steps", 4), "--accum_steps 4: an epoch has only 3 batches; lower it"),
        (("--start_epoch", 1), "--start_epoch 1: the run has only 1 epoch, counted from 0"),
        (("--start_epoch", 1, "--resume", tmp_path / "model.pth"), "--start_epoch 1: the run has only 1 epoch"),
    ):
        with pytest.raises(InputError, match=message):
            train(shapes, tmp_path / "out", "--epochs", 1, *more)


def test_overfit_repeats_images_to_fill_a_batch(shapes, tmp_path, capsys):
    train(shapes, tmp_path, "--epochs", 1, "--overfit", 2, "--eval_every", 9)
    assert "--overfit 2: only 2 images have boxes, so that a batch of 4 images repeats some" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    checkpoint["model"]["query_embed.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "c.pth")
    for more in (("--eval", "--resume"), ("--epochs", 1, "--finetune")):
        with pytest.raises(InputError, match=r"weights are not finite, the first in query_embed.weight; use an ear"):
            main.main(main.get_args_parser().parse_args(flags(shapes, *more, tmp_path / "c.pth")))


def test_diverging_training_stops_before_it_writes_a_checkpoint(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    checkpoint["model"]["class_embed.bias"][:] = float("inf")
    torch.save(checkpoint, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"training diverged in epoch 3, step 0, .* loss nan, .* on images \["):
        train(shapes, tmp_path, "--epochs", 4, "--lr_drop", 2, "--dropout", 0, "--resume", tmp_path / "c.pth")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_evaluation_says_that_weights_are_random(shapes, capsys):
    main.main(main.get_args_parser().parse_args(flags(shapes, "--eval")))
    assert "evaluating random weights" in capsys.readouterr().out
