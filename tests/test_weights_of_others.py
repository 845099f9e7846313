"""Weights from other training scripts: wrapped, prefixed, averaged, without a head; and files that would run code."""

import os
import re

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import main
from checkpoints.checkpoint import PUBLISHED, load_checkpoint
from models import build_model
from scripts import predict
from scripts.detector import load_detector
from tests.conftest import TINY
from tests.hostile import Calls, Unknown
from util.errors import InputError

HEADS = (
    "class_embed.weight",
    "class_embed.bias",
    *(f"bbox_embed.layers.{i}.{k}" for i in range(3) for k in ("weight", "bias")),
)
pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def args(parse):
    return parse(*TINY, "--num_classes", 4)


@pytest.fixture
def raw(args) -> dict[str, Tensor]:
    return build_model(args)[0].state_dict()


@pytest.fixture
def save(args, tmp_path):
    """Write a file with the flags and the given contents."""

    def save(contents: object, **more: object):
        torch.save({"args": vars(args)} | contents | more, tmp_path / "c.pth")
        return tmp_path / "c.pth"

    return save


def shifted(weights: dict[str, Tensor], by: float = 1.0) -> dict[str, Tensor]:
    """Return weights with another query embedding, which stand for an average."""
    return weights | {"query_embed.weight": weights["query_embed.weight"] + by}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda w: w, "its top level"),
        (lambda w: prefixed("module.", w), "module"),
        (lambda w: prefixed("_orig_mod.", w), "_orig_mod"),
        (lambda w: {"model": prefixed("module._orig_mod.", w)}, "model.module._orig_mod"),
        (lambda w: {"model": {n.replace("transformer.", "transformer._orig_mod."): t for n, t in w.items()}}, ""),
        (lambda w: {"state_dict": w}, "state_dict"),
        (lambda w: {"state_dict": prefixed("model.", w), "hyper_parameters": {"lr": 1}}, "state_dict.model"),
        (lambda w: {"model_state_dict": w}, "model_state_dict"),
        (lambda w: {"ema": {"module": w}}, "averaged weights in ema.module"),
        (lambda w: {"model": w}, ""),
    ],
)
def test_wrapped_weights_are_found(wrap, place, raw, tmp_path, capsys):
    torch.save(wrap(raw), tmp_path / "c.pth")
    weights = load_checkpoint(tmp_path / "c.pth")["model"]
    assert weights.keys() == raw.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in raw.items())
    printed = capsys.readouterr().out
    assert printed.endswith(f"{place}\n") if place else printed == ""


AVERAGES = {
    "model_ema": lambda w: {"model_ema": w},
    "ema": lambda w: {"ema": w},
    "model_ema.module": lambda w: {"model_ema": {"module": w, "updates": 7}},
    "ema_state_dict.module": lambda w: {"ema_state_dict": prefixed("module.", w) | {"n_averaged": torch.tensor(3)}},
    "state_dict.ema": lambda w: {"state_dict": prefixed("ema.", w)},
}


@pytest.mark.parametrize("place", AVERAGES)
def test_averaged_weights_are_preferred_unless_training_continues(place, raw, save, capsys):
    path = save(AVERAGES[place](shifted(raw)), model=raw)
    for training, kind, name, other, by in (
        (False, "averaged", place, "model", 1),
        (True, "raw", "model", place, 0),
    ):
        weights = load_checkpoint(path, training)["model"]
        assert torch.equal(weights["query_embed.weight"], raw["query_embed.weight"] + by)
        assert f"taking the {kind} weights in {name}, not those in {other}" in capsys.readouterr().out


def test_only_resumed_runs_take_raw_weights(args, raw, save, shapes, tmp_path, parse, capsys, monkeypatch):
    """--eval, --finetune and predict take averaged weights; --resume continues with raw ones."""
    path = save({"model": raw, "model_ema": shifted(raw, by=100)}, epoch=0)
    used: list[float] = []
    forward = type(build_model(args)[0]).forward
    monkeypatch.setattr(
        type(build_model(args)[0]),
        "forward",
        lambda self, samples: used.append(self.query_embed.weight.mean().item()) or forward(self, samples),
    )

    def first_use(run) -> str:
        used.clear()
        run()
        printed = capsys.readouterr().out
        return "averaged" if used[0] > 50 and "taking the averaged" in printed else "raw"

    common = (*TINY, "--coco_path", shapes, "--epochs", 1)
    photo = next((shapes / "images" / "val2017").iterdir())
    out = ("--output", str(tmp_path / "out"), str(photo))
    assert first_use(lambda: main.main(parse(*common, "--eval", "--resume", path))) == "averaged"
    assert first_use(lambda: main.main(parse(*common, "--finetune", path))) == "averaged"
    assert first_use(lambda: predict.main(["--checkpoint", str(path), *out])) == "averaged"
    assert first_use(lambda: main.main(parse(*common, "--resume", path))) == "raw"


def test_averages_without_buffers_take_those_of_the_model(args, save, capsys):
    """torch's averages have no buffers, and timm's may not have frozen layers."""
    model, _, _ = build_model(args)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    torch.nn.init.ones_(model.query_embed.weight)
    model.backbone[0].body.bn1.running_mean.fill_(7)
    for _ in range(2):
        average.update_parameters(model)
    buffers = {name for name, _ in average.named_buffers()}
    learned = {name: tensor for name, tensor in average.state_dict().items() if name not in buffers}
    path = save({"model": model.state_dict(), "ema": learned})
    weights = load_checkpoint(path)["model"]
    assert torch.equal(weights["query_embed.weight"], average.module.query_embed.weight)
    assert torch.equal(weights["backbone.0.body.bn1.running_mean"], torch.full((64,), 7.0))
    assert re.search(
        r"ema.module, not those in model, except for \d+ tensors of the backbone without averages",
        capsys.readouterr().out,
    )
    load_detector(str(path))
    del learned["module.input_proj.bias"]  # learned weights are never mixed
    with pytest.raises(InputError, match=r"input_proj.bias is \[32\] in the model, missing in the file"):
        load_detector(str(save({"model": model.state_dict(), "ema": learned})))


def test_only_finetuning_accepts_weights_without_heads(raw, save, shapes, parse, capsys):
    headless = {name: tensor for name, tensor in raw.items() if name not in HEADS}
    path = save({"model": headless})
    main.main(parse(*TINY, "--coco_path", shapes, "--epochs", 1, "--finetune", path))
    printed = capsys.readouterr().out
    assert f"starting from {path}: {len(headless)} tensors; 3 new classes (circle, square, triangle)" in printed
    missing = "class_embed.weight, class_embed.bias, bbox_embed.layers.0.weight"
    assert f"starting from random weights, because {path} has none for this model: {missing}" in printed
    for flags in (("--eval", "--resume"), ("--resume",)):
        with pytest.raises(
            InputError, match=r"it has no class head \(class_embed.bias\); train from its other weights with --finetune"
        ):
            main.main(parse(*TINY, "--coco_path", shapes, *flags, path))


@pytest.mark.parametrize(
    ("contents", "found"),
    [
        ({"epoch": 3, 7: 1}, "it holds the keys args, epoch, 7; expected model with keys such as query_embed.weight"),
        ({"model": {"conv1.weight": 1}}, "it holds the keys args, model, and its model the keys conv1.weight"),
        (
            {"model": {"class_labels_classifier.bias": torch.zeros(4)}},
            "the weights of a Hugging Face model; name its folder",
        ),
    ],
)
def test_files_without_weights_are_refused(contents, found, save):
    with pytest.raises(InputError, match=re.escape(found)):
        load_checkpoint(save(contents))


def test_unknown_names_are_refused(parse, shapes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main.main(parse(*TINY, "--coco_path", shapes, "--eval", "--resume", "conditional_detr_resnet50dc5"))
    assert "did you mean conditional_detr_resnet50_dc5?" in str(error.value)
    assert all(name in str(error.value) for name in PUBLISHED)
    with pytest.raises(InputError, match=r"^absent.pth: no such checkpoint$"):
        load_checkpoint("absent.pth")


def test_the_error_for_a_folder_names_the_checkpoints_in_it(save, raw, parse, shapes, tmp_path):
    best = save({"model": raw}).rename(tmp_path / "checkpoint_best.pth")
    latest = save({"model": raw}).rename(tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=rf"name a file in it: {latest}, {best}"):
        main.main(parse(*TINY, "--coco_path", shapes, "--resume", tmp_path))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "touch executed"), "posix.system"),
        (Calls(eval, "open('executed', 'w')"), "eval"),
        (Calls(open, "executed", "w"), "io.open"),
        (Unknown(), "tests.hostile.Unknown"),
        (torch.nn.Identity(), "torch.nn.modules.linear.Identity"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_named_and_does_not_run(value, name, zipped, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for contents in ({"model": raw, "args": value}, {"model": raw | {"x": value}}, value):
        torch.save(contents, "c.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            InputError, match=rf"c.pth: refused because it contains code or objects .*: an object of type {name}$"
        ):
            load_checkpoint("c.pth")
    assert not (tmp_path / "executed").exists()
