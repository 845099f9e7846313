"""NaN and infinite weights or outputs of a model end in one line, and are never written as invalid JSON."""

import json
import math

import pytest
import torch
from PIL import Image

import main
from checkpoints.backbone_weights import load_backbone_weights
from models import build_model
from models.backbone import Backbone
from run.log_file import append_log, read_log
from scripts import convert, demo_pictures, export_onnx, plot_attention, predict
from tests.conftest import TINY
from util.errors import InputError

NORM = "transformer.decoder.norm.weight"  # with the largest float in this last norm, logits are infinite or NaN


@pytest.fixture
def broken(parse, tmp_path):
    """Write a checkpoint of a small model in which the first 8 elements of one weight have the given value."""

    def broken(value: float, key: str = "query_embed.weight", name: str = "checkpoint.pth"):
        args = parse(*TINY, "--num_classes", 4)
        weights = build_model(args)[0].state_dict()
        weights[key].view(-1)[:8] = value
        torch.save({"model": weights, "args": vars(args)}, tmp_path / name)
        return tmp_path / name

    return broken


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tools_refuse_weights_that_are_not_finite(value, broken, photo, tmp_path):
    checkpoint, out = broken(value), tmp_path / "out"
    for tool, flags in (
        (predict, ("--checkpoint", checkpoint, "--output", out, photo)),
        (plot_attention, ("--checkpoint", checkpoint, "--image", photo, "--output", out.with_suffix(".png"))),
        (convert, (checkpoint, out, "--to", "transformers")),
        (export_onnx, ("--checkpoint", checkpoint, "--output", out)),
        (demo_pictures, ("--output_dir", tmp_path)),
    ):
        with pytest.raises(
            InputError, match=r"checkpoint.pth: weights are not finite, the first in query_embed.weight"
        ):
            tool.main(list(map(str, flags)))
    assert not out.exists()


@pytest.mark.parametrize("flags", [("--eval", "--resume"), ("--epochs", 1, "--finetune")])
def test_main_refuses_weights_that_are_not_finite(flags, broken, shapes, parse):
    with pytest.raises(InputError, match=r"checkpoint.pth: weights are not finite, the first in query_embed.weight"):
        main.main(parse(*TINY, "--coco_path", shapes, *flags, broken(math.nan)))


def test_backbone_weights_that_are_not_finite_are_refused(tmp_path):
    backbone = Backbone("resnet18")
    weights = backbone.body.state_dict()
    weights["layer4.1.conv2.weight"][0, 0, 0, 0] = math.nan
    torch.save(weights, tmp_path / "resnet18.pth")
    with pytest.raises(InputError, match=r"resnet18.pth: weights are not finite, the first in layer4.1.conv2.weight"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "resnet18.pth"))


def test_outputs_that_are_not_finite_are_refused(broken, photo, shapes, tmp_path, parse):
    checkpoint, out = broken(torch.finfo(torch.float32).max, NORM), tmp_path / "out"
    with pytest.raises(InputError, match="the model's detections in image id 1 are not finite: check its weights"):
        main.main(parse(*TINY, "--coco_path", shapes, "--eval", "--resume", checkpoint, "--output_dir", out))
    with pytest.raises(InputError, match="the model's detections in an image are not finite: check its weights"):
        predict.main(["--checkpoint", str(checkpoint), "--output", str(out), str(photo)])
    assert not (out / "detections.json").exists()
    with pytest.raises(InputError, match=r"checkpoint.pth: the model's outputs for .*photo.png are not finite"):
        plot_attention.main(["--checkpoint", str(checkpoint), "--image", str(photo), "--output", str(out / "a.png")])


def test_the_log_has_null_for_numbers_that_are_not_finite(tmp_path):
    """A loss on val may overflow in half precision; training continues."""
    append_log(tmp_path / "log.txt", {"epoch": 0, "test_loss": math.nan, "test_coco_eval_bbox": [0.1, -math.inf]})
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    json.loads(line, parse_constant=pytest.fail)
    assert read_log(tmp_path / "log.txt") == [{"epoch": 0, "test_loss": None, "test_coco_eval_bbox": [0.1, None]}]


def test_an_epoch_whose_steps_are_all_skipped_ends_the_run(broken, shapes, tmp_path, parse):
    """With --skip_nonfinite, such a run would otherwise continue for all its epochs, and end like any other."""
    flags = ("--resume", broken(math.nan), "--output_dir", tmp_path / "out", "--epochs", 3, "--skip_nonfinite", 99)
    with pytest.raises(InputError, match="all steps of epoch 0 were skipped, because none was finite: lower --lr"):
        main.main(parse(*TINY, "--coco_path", shapes, *flags))
    assert not (tmp_path / "out" / "log.txt").exists()
