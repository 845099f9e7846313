"""Instance masks: training, evaluation, checkpoints and pictures."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

import main
import training
from scripts import demo_pictures, predict
from scripts.benchmarking.masks import WithAllMasks
from scripts.prediction.gallery import image_entry
from tests.conftest import TINY, assert_same_end, log_lines
from tests.small import build_small
from tests.two_processes import images_and_targets
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


def test_training_is_evaluated_on_masks_and_ends_the_same_after_resuming(shapes, tmp_path, parse):
    flags = (*TINY, "--coco_path", shapes, "--masks", "--ema_decay", 0.9)
    main.main(parse(*flags, "--epochs", 2, "--output_dir", tmp_path / "once"))
    lines = log_lines(tmp_path / "once")
    assert all(len(line["test_coco_eval_masks"]) == len(line["test_coco_eval_bbox"]) == 12 for line in lines)
    assert all(line[f"train_{name}"] > 0 for line in lines for name in ("loss_mask", "loss_dice"))
    for epochs in (1, 2):
        main.main(parse(*flags, "--epochs", epochs, "--output_dir", tmp_path / "twice", "--resume", "auto"))
    assert_same_end(tmp_path / "twice", tmp_path / "once")


def test_a_head_that_is_interrupted_within_an_epoch_ends_the_same(shapes, tmp_path, parse, monkeypatch):
    """Train a head on a frozen detector, and interrupt it after two of the three steps of an epoch."""
    flags = (*TINY, "--coco_path", shapes, "--epochs", 1)
    main.main(parse(*flags, "--output_dir", tmp_path / "boxes"))
    flags += ("--masks", "--frozen_weights", tmp_path / "boxes" / "checkpoint.pth", "--ema_decay", 0.9)
    flags += ("--accum_steps", 1, "--save_every", 1, "--resume", "auto", "--output_dir")
    main.main(parse(*flags, tmp_path / "once"))

    def interrupted(run, epoch, original=training.TrainingRun.after_step):
        original(run, epoch)
        if run.progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.TrainingRun, "after_step", interrupted)
        main.main(parse(*flags, tmp_path / "twice"))
    assert torch.load(tmp_path / "twice" / "checkpoint.pth", weights_only=True)["step"] == 2
    main.main(parse(*flags, tmp_path / "twice"))
    assert_same_end(tmp_path / "twice", tmp_path / "once")


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "bf16", "--accum_steps", 2, "--checkpoint_activations"),
        ("--model", "detr", "--dropout", 0.1),
        ("--group_detr", 2),
    ],
)
def test_masks_can_be_trained_with_other_flags(more, shapes, tmp_path, parse):
    main.main(parse(*TINY, "--coco_path", shapes, "--masks", "--epochs", 1, "--output_dir", tmp_path, *more))
    (line,) = log_lines(tmp_path)
    assert 0 < line["train_loss_mask"] < 5
    assert 0 < line["train_loss_dice"] <= 1
    assert 0 <= line["test_coco_eval_masks"][0] <= 1


@pytest.mark.parametrize("groups", [1, 2])
def test_masks_of_matched_queries_alone_give_the_same_losses_and_gradients(groups):
    model, criterion = build_small("--masks", "--dropout", 0, "--num_classes", 4, "--group_detr", groups)
    model.double().train()
    images, targets = images_and_targets([3, 0, 2])
    images = [image.double() / 255 for image in images]
    targets = [target | {"boxes": target["boxes"].double()} for target in targets]
    results = []
    for network in (model, WithAllMasks(model)):
        model.zero_grad()
        losses = criterion.train()(network(images), targets)
        sum(losses[name] for name in ("loss_mask", "loss_dice")).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (expected_losses, expected) = results
    assert gradients.keys() == expected.keys()
    assert losses["loss_dice"].item() == pytest.approx(expected_losses["loss_dice"].item(), rel=1e-9)
    assert losses["loss_mask"].item() == pytest.approx(expected_losses["loss_mask"].item(), rel=1e-9)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-6, atol=1e-12), name


def test_evaluation_takes_the_flag_masks_from_the_checkpoint(shapes, tmp_path, parse, capsys):
    flags = (*TINY, "--coco_path", shapes)
    main.main(parse(*flags, "--masks", "--epochs", 1, "--output_dir", tmp_path / "run"))
    capsys.readouterr()
    main.main(parse(*flags, "--eval", "--resume", tmp_path / "run" / "checkpoint.pth"))
    printed = capsys.readouterr().out
    assert "flags of" in printed and "--masks" in printed
    assert "IoU metric: segm" in printed


def test_only_the_head_is_trained_on_a_frozen_detector(shapes, tmp_path, parse):
    flags = (*TINY, "--coco_path", shapes, "--epochs", 1)
    main.main(parse(*flags, "--output_dir", tmp_path / "boxes"))
    boxes = tmp_path / "boxes" / "checkpoint.pth"
    main.main(parse(*flags, "--masks", "--frozen_weights", boxes, "--output_dir", tmp_path / "masks"))
    before = torch.load(boxes, weights_only=True)["model"]
    saved = torch.load(tmp_path / "masks" / "checkpoint.pth", weights_only=True)
    for key, value in before.items():
        assert torch.equal(saved["model"][f"detr.{key}"], value), key
    trained = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert trained == sum(not key.startswith("detr.") for key in saved["model"])
    with pytest.raises(InputError, match="already has a mask head"):
        main.main(parse(*flags, "--masks", "--frozen_weights", tmp_path / "masks" / "checkpoint.pth"))


def test_fine_tuning_adds_or_drops_the_mask_head(shapes, tmp_path, parse, capsys):
    flags = (*TINY, "--coco_path", shapes, "--epochs", 1)
    main.main(parse(*flags, "--output_dir", tmp_path / "boxes"))
    boxes, masks = (tmp_path / name / "checkpoint.pth" for name in ("boxes", "masks"))
    main.main(parse(*flags, "--masks", "--finetune", boxes, "--output_dir", tmp_path / "masks"))
    assert "the mask head starts from random weights" in capsys.readouterr().out
    main.main(parse(*flags, "--finetune", masks, "--output_dir", tmp_path / "again"))
    assert "not copied" not in capsys.readouterr().out
    main.main(parse(*flags, "--masks", "--finetune", masks, "--output_dir", tmp_path / "more"))
    assert "the mask head starts from random weights" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frozen_weights", "x.pth"), "add --masks"),
        (("--masks", "--frozen_weights", "x.pth", "--finetune", "y.pth"), "drop one"),
    ],
)
def test_flags_that_cannot_be_combined_are_refused(flags, message, parse):
    with pytest.raises(InputError, match=message):
        main.main(parse(*TINY, *flags))


def test_prediction_writes_and_draws_masks(shapes, tmp_path, parse):
    main.main(parse(*TINY, "--coco_path", shapes, "--masks", "--epochs", 1, "--output_dir", tmp_path / "run"))
    image = min((shapes / "images" / "val2017").iterdir())
    flags = [
        "--checkpoint",
        tmp_path / "run" / "checkpoint.pth",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
        image,
    ]
    predict.main([*map(str, flags), "--threshold", "0"])
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    picture = Image.open(tmp_path / "out" / "pictures" / image.name)
    assert results
    for result in results:
        assert mask_api.decode(result["segmentation"]).shape == picture.size[::-1]
    demo_pictures.main(["--output_dir", str(tmp_path / "run"), "--threshold", "0"])
    assert (tmp_path / "run" / "predictions.png").exists()


def test_the_gallery_has_the_part_of_a_mask_that_is_in_its_box():
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    mask[10:20, 10:40] = 1
    detections = {
        "scores": torch.tensor([0.9, 0.01, 0.8]),
        "labels": torch.tensor([1, 1, 2]),
        "boxes": torch.tensor([[10.0, 10, 50, 20], [0, 0, 5, 5], [0, 30, 20, 40]]),
        "codes": [mask_api.encode(mask)] * 3,
    }
    first, second = image_entry("a", Path("a.jpg"), (60, 40), detections)["boxes"]
    picture = Image.open(io.BytesIO(base64.b64decode(first[6].removeprefix("data:image/png;base64,"))))
    assert picture.size == (40, 10)
    alpha = np.asarray(picture.getchannel("A"))
    assert (alpha[:, :30] == 255).all() and not alpha[:, 30:].any()
    assert second[6] == ""  # the mask has no pixel in that box
