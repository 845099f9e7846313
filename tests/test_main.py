"""Runs through the command line: training, resuming, evaluating, several processes, and mistakes."""

import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image

import main
import training
from scripts import demo_pictures
from tests.conftest import TINY, log_lines
from util.errors import InputError


def flags(shapes, *more: object) -> list[str]:
    return [*TINY, "--coco_path", str(shapes), *map(str, more)]


def train(shapes, output, *more: object) -> None:
    main.main(main.get_args_parser().parse_args(flags(shapes, "--output_dir", output, *more)))


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """Three epochs without a break."""
    output = tmp_path_factory.mktemp("trained")
    train(shapes, output, "--epochs", 3, "--lr_drop", 2, "--dropout", 0)
    return output


def test_the_pictures_of_a_run(trained, tmp_path, capsys):
    """Six images whose long side is 320, each with its ground truth next to the detections."""
    for name in ("checkpoint.pth", "log.txt"):
        shutil.copy(trained / name, tmp_path / name)
    demo_pictures.main(["--output_dir", str(tmp_path), "--threshold", "0"])
    assert f"wrote {tmp_path / 'predictions.png'}\n" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "predictions.png").size
    assert 1000 < width <= 2 * (2 * 320 + 8) + 3 * 8
    assert 600 < height <= 3 * (320 + 32) + 4 * 8


def test_what_a_run_leaves(trained):
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
        assert line["n_parameters"] > 1e7
        for part in ("train", "test"):
            keys = {key.removeprefix(f"{part}_") for key in line if key.startswith(part)}
            losses = {f"loss_{name}{suffix}" for name in ("ce", "bbox", "giou") for suffix in ("", "_0")}
            errors = {"class_error", "cardinality_error", "cardinality_error_0"}
            assert {"loss", "class_error"} | losses | {f"{key}_unscaled" for key in losses | errors} <= keys
            assert line[f"{part}_loss_bbox"] == pytest.approx(5 * line[f"{part}_loss_bbox_unscaled"], rel=1e-4)


def test_the_best_checkpoint(shapes, trained, tmp_path, run_main):
    """For inference: it evaluates to the AP that the log names, and is the start of a new run, not a place to go on."""
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


@pytest.fixture
def scores(monkeypatch):
    """Makes the evaluations find one AP after the other."""

    def scores(*aps: float) -> None:
        left = iter(aps)

        def evaluate(*args, original=main.evaluate, **kwargs):
            stats, evaluator = original(*args, **kwargs)
            stats["coco_eval_bbox"][0] = next(left)
            return stats, evaluator

        monkeypatch.setattr(main, "evaluate", evaluate)

    return scores


@pytest.mark.parametrize(("aps", "best"), [((0.1, 0.3, 0.3, 0.2), 1), ((-1, 0.0), 1)])
def test_the_first_of_the_highest_aps_is_the_best(aps, best, shapes, tmp_path, scores):
    """As COCO has it, -1 is the AP of data without ground truth. The run goes on once in the middle."""
    scores(*aps)
    train(shapes, tmp_path, "--epochs", len(aps) - 1)
    train(shapes, tmp_path, "--epochs", len(aps), "--resume", "auto")
    checkpoint = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["ap"]) == (best, aps[best])


def test_a_best_epoch_interrupted_before_its_line_in_the_log(shapes, tmp_path, scores, monkeypatch):
    """It is evaluated again, and counts once."""

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


def test_a_resumed_run_ends_like_one_never_interrupted(shapes, trained, tmp_path, capsys):
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


def test_the_remaining_time_of_the_run(shapes, tmp_path, capsys):
    """In each line of an epoch by its steps, after each epoch with evaluation; the last epoch ends the run."""
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


def test_going_on_from_an_earlier_checkpoint_drops_later_log_lines(shapes, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    resume = trained / "checkpoint0001.pth"
    train(shapes, tmp_path / "run", "--epochs", 3, "--dropout", 0, "--lr_drop", 3, "--resume", resume)
    printed = capsys.readouterr().out
    assert "dropped 1 line of epoch 2 and later" in printed
    assert "--lr_drop is 3 now, 2 in the checkpoint" in printed
    lines = log_lines(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[2]["train_lr"] == pytest.approx(1e-4)


def test_a_model_without_training_state_is_a_start(shapes, trained, tmp_path, capsys):
    model = torch.load(trained / "checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": model}, tmp_path / "model.pth")
    train(shapes, tmp_path, "--epochs", 1, "--resume", tmp_path / "model.pth")
    assert "no state of the training" in capsys.readouterr().out
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0]


def test_evaluation_alone_gives_the_same_numbers(shapes, trained, tmp_path, run_main):
    """With the val files only, through the command line."""
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


def test_evaluating_every_other_epoch(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 3, "--eval_every", 2)
    assert ["test_loss" in line for line in log_lines(tmp_path)] == [False, True, True]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])  # CPUs lack its convolutions
def test_precision_of_the_forward_pass(amp, shapes, trained, tmp_path):
    common = ("--amp", amp, "--dropout", 0, "--lr_drop", 2, "--resume", "auto")
    for epochs in (1, 2):
        train(shapes, tmp_path, "--epochs", epochs, *common)
    scaler = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["scaler"]
    if amp == "fp16":
        assert 0 < scaler["scale"] < 2**16  # steps that overflow come first, and lower it
    else:
        assert scaler == {}
    for ours, float32 in zip(log_lines(tmp_path), log_lines(trained), strict=False):
        assert ours["train_loss"] == pytest.approx(float32["train_loss"], rel=0.1)
        assert ours["train_loss"] != float32["train_loss"]


def test_start_epoch_without_a_checkpoint(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 3, "--start_epoch", 2, "--lr_drop", 2)
    (line,) = log_lines(tmp_path)
    assert (line["epoch"], line["train_lr"]) == (2, pytest.approx(1e-5))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--coco_path", "/nowhere"), "--coco_path /nowhere: no such folder"),
        (("--masks",), "--masks: segmentation is not supported yet"),
        (("--frozen_weights", "x"), "--frozen_weights: segmentation is not supported yet"),
        (("--mask_loss_coef", 2), "--mask_loss_coef: segmentation is not supported yet"),
        (("--dice_loss_coef", 2), "--dice_loss_coef"),
        (("--coco_panoptic_path", "x"), "--coco_panoptic_path"),
        (("--dataset_file", "coco_panoptic"), "--dataset_file coco_panoptic: only coco"),
        (("--batch_size", 0), "--batch_size 0: must be at least 1"),
        (("--batch_size", 15), "14 images are fewer than a batch of 15"),
        (("--dropout", 1.5), "--dropout 1.5: must be between 0 and 1"),
        (("--device", "tpu0"), "--device tpu0: not a device"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU"),
        (("--resume", "absent.pth"), "absent.pth: no such checkpoint"),
        (("--resume", "auto"), "--resume auto looks for checkpoints in --output_dir"),
        (("--num_classes", 3), "category id 3 (triangle) does not fit the class head of 3 logits"),
        (("--max_size", 10), "--max_size 10: must be at least --min_size 64"),
        (("--lr", -1), "--lr -1.0: must be at least 0"),
        (("--output_dir", __file__), "test_main.py: cannot be made"),
    ],
)
def test_mistakes(more, message, shapes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        main.main(main.get_args_parser().parse_args(flags(shapes, "--epochs", 1, *more)))
    assert message in str(error.value)


def test_flags_with_which_nothing_would_be_trained(shapes, trained, tmp_path):
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


def test_overfitting_fewer_images_than_a_batch(shapes, tmp_path, capsys):
    train(shapes, tmp_path, "--epochs", 1, "--overfit", 2, "--eval_every", 9)
    assert "--overfit 2: a batch of 4 images repeats the 2 with boxes" in capsys.readouterr().out


def test_flags_of_the_model_come_from_the_checkpoint(shapes, trained, tmp_path, run_main):
    """Neither evaluation nor resuming needs them; what is given and contradicts is refused."""
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


def test_weights_that_are_not_finite_are_not_evaluated(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    checkpoint["model"]["query_embed.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "c.pth")
    for more in (("--eval", "--resume"), ("--epochs", 1, "--finetune")):
        with pytest.raises(InputError, match=r"weights are not finite, the first in query_embed.weight; use an ear"):
            main.main(main.get_args_parser().parse_args(flags(shapes, *more, tmp_path / "c.pth")))


def test_a_mistake_is_one_line_on_the_terminal(shapes, tmp_path, run_main):
    broken = tmp_path / "coco"
    shutil.copytree(shapes, broken)
    (broken / "images" / "train2017" / "000003.jpg").write_bytes(b"no image")
    done = run_main(*flags(broken, "--epochs", 1, "--num_workers", 1))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "000003.jpg (image id 3): cannot be decoded" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_images_are_skipped_on_request(shapes, tmp_path, capsys):
    broken = tmp_path / "coco"
    shutil.copytree(shapes, broken)
    (broken / "images" / "train2017" / "000003.jpg").write_bytes(b"no image")
    (broken / "images" / "val2017" / "000005.jpg").unlink()
    train(broken, tmp_path / "out", "--epochs", 1, "--on_bad_image", "skip")
    printed = capsys.readouterr().out
    assert "1 of 7 images of" in printed
    assert "warning: 1 image could not be read and was skipped: 000003.jpg (image id 3)" in printed
    assert "warning: 1 image could not be read and was skipped: 000005.jpg (image id 5)" in printed
    assert len(torch.load(tmp_path / "out" / "eval" / "latest.pth", weights_only=True)["params"]["imgIds"]) == 6


def test_a_new_run_does_not_write_over_another(shapes, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds the checkpoints of a run: continue it by --resume auto, or name"):
        train(shapes, tmp_path / "run", "--epochs", 1)
    assert log_lines(tmp_path / "run") == log_lines(trained)


def test_a_checkpoint_of_another_model(shapes, trained):
    resume = ("--eval", "--resume", trained / "checkpoint.pth")
    for more, message in (
        (("--nheads", 4), "--nheads is 4 now, 2 in the checkpoint"),
        (("--num_classes", 9), "--num_classes 9 contradicts the 4 classes"),
    ):
        with pytest.raises(InputError, match=message):
            main.main(main.get_args_parser().parse_args(flags(shapes, *resume, *more)))


def test_data_of_other_classes_than_the_checkpoint(shapes, trained, tmp_path):
    other = tmp_path / "coco"
    shutil.copytree(shapes, other)
    path = other / "annotations" / "instances_val2017.json"
    data = json.loads(path.read_text())
    for entry in (*data["categories"], *data["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] += 10
        if "name" in entry:
            entry["name"] = f"new {entry['name']}"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"category id 13 \(new triangle\) does not fit the class head of 4 logits"):
        main.main(main.get_args_parser().parse_args(flags(other, "--eval", "--resume", trained / "checkpoint.pth")))


def test_diverging_training_stops_before_it_touches_the_weights(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    checkpoint["model"]["class_embed.bias"][:] = float("inf")
    torch.save(checkpoint, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"training diverged in epoch 3, step 0, .* loss nan, .* on images \["):
        train(shapes, tmp_path, "--epochs", 4, "--lr_drop", 2, "--dropout", 0, "--resume", tmp_path / "c.pth")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_evaluating_without_a_checkpoint_says_so(shapes, capsys):
    main.main(main.get_args_parser().parse_args(flags(shapes, "--eval")))
    assert "evaluating random weights" in capsys.readouterr().out


def without_boxes(shapes, tmp_path, *splits: str):
    """Return a copy of the data in which splits have no annotations."""
    empty = tmp_path / "coco"
    shutil.copytree(shapes, empty)
    for split in splits:
        path = empty / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    return empty


def test_training_data_without_any_box(shapes, tmp_path):
    empty = without_boxes(shapes, tmp_path, "train")
    with pytest.raises(InputError, match=r"instances_train2017.json: no image has a box to learn from"):
        train(empty, tmp_path / "out", "--epochs", 1)


def test_training_data_whose_boxes_are_in_unreadable_images(shapes, tmp_path):
    """Their images would be skipped, and nothing would be learned; a single one that can be read is enough."""
    data = without_boxes(shapes, tmp_path, "train")
    path = data / "annotations" / "instances_train2017.json"
    annotations = json.loads((shapes / "annotations" / path.name).read_text())
    kept = {entry["id"] for entry in annotations["images"][:3]}
    boxes = [entry for entry in annotations["annotations"] if entry["image_id"] in kept]
    path.write_text(json.dumps(annotations | {"annotations": boxes}))
    missing, *unreadable = (data / "images" / "train2017" / entry["file_name"] for entry in annotations["images"][:3])
    missing.unlink()
    for file in unreadable:
        file.write_bytes(b"no image")
    skip = "--epochs", 1, "--on_bad_image", "skip"
    with pytest.raises(InputError, match=r"train2017.json: no image with boxes can be used .3 tried.*003"):
        train(data, tmp_path / "out", *skip)
    shutil.copy(shapes / "images" / "train2017" / unreadable[-1].name, unreadable[-1])
    train(data, tmp_path / "out", *skip)


def test_validation_data_without_any_box(shapes, tmp_path, capsys):
    empty = without_boxes(shapes, tmp_path, "val")
    train(empty, tmp_path / "out", "--epochs", 1)
    assert "instances_val2017.json has no boxes: AP cannot be measured, and no best" in capsys.readouterr().out
    (line,) = log_lines(tmp_path / "out")
    assert line["test_coco_eval_bbox"][0] == -1
    assert line["test_loss_bbox"] == 0
    assert line["test_class_error"] == 100
    assert not (tmp_path / "out" / "checkpoint_best.pth").exists()


def test_imagenet_weights_are_fetched_for_a_new_run_only(shapes, trained, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    imagenet = ("--backbone_weights", "imagenet")
    with pytest.raises(InputError, match=r"resnet18-f37072fd.pth could not be downloaded \(offline\)"):
        train(shapes, tmp_path, "--epochs", 1, *imagenet)
    main.main(main.get_args_parser().parse_args(flags(shapes, "--eval", *imagenet)))
    resume = ("--resume", trained / "checkpoint.pth")
    with pytest.raises(InputError, match="--backbone_weights none"):  # loaded, but other parameters would train
        train(shapes, tmp_path, "--epochs", 4, *imagenet, *resume)


def test_large_image_files_do_not_slip_through(shapes, tmp_path):
    other = tmp_path / "coco"
    shutil.copytree(shapes, other)
    Image.new("RGB", (300, 10)).save(other / "images" / "val2017" / "000001.jpg")
    with pytest.raises(InputError, match=r"000001.jpg \(image id 1\): is 300×10, but"):
        main.main(main.get_args_parser().parse_args(flags(other, "--eval")))
