"""DETR on the command line: its defaults, a training run, and every use of its weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
import main
from checkpoints.checkpoint import load_checkpoint
from checkpoints.published import PUBLISHED
from datasets.classes import Classes
from datasets.images import read_image
from evaluation.attention_maps import AttentionMaps, recorded, view
from flags.parser import ParsedFlags, get_args_parser, parse_flags
from flags.resolve import resolve
from models import build_model
from models.classification import SoftmaxWithNoObject
from run.finetune import start_from
from scripts import convert, export_onnx, plot_attention, predict
from scripts.detector import load_detector
from tests.conftest import ROOT, TINY, log_lines
from tests.reference import reference_weights, sharpened
from util.errors import InputError

DETR = ("--model", "detr")


def flags_of(*command: str):
    return resolve(parse_flags(get_args_parser(), [*command, "--device", "cpu"], ParsedFlags()))


def test_defaults_depend_on_the_model_unless_they_are_given():
    names = "num_queries", "epochs", "lr_drop", "set_cost_class", "cls_loss_coef", "set_cost_bbox"
    detr, conditional = flags_of(*DETR), flags_of()
    assert [getattr(detr, name) for name in names] == [100, 300, 200, 1, 1, 5]
    assert [getattr(conditional, name) for name in names] == [300, 50, 40, 2, 2, 5]
    given = flags_of(*DETR, "--num_queries", "300", "--epochs", "50")
    assert (given.num_queries, given.epochs, given.lr_drop) == (300, 50, 200)
    assert resolve(given).num_queries == 300
    of_checkpoint = resolve(conditional, model="detr", num_queries=50)
    assert (of_checkpoint.num_queries, of_checkpoint.epochs) == (50, 300)
    assert resolve(of_checkpoint, model="conditional_detr").epochs == 50
    with pytest.raises(InputError, match="--model yolo: choose one of conditional_detr, detr"):
        resolve(flags_of(), model="yolo")


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("detr")
    flags = [*TINY, *DETR, "--coco_path", shapes, "--output_dir", output, "--epochs", 2, "--lr_drop", 1]
    main.main(get_args_parser().parse_args([str(flag) for flag in flags]))
    return output


def test_the_checkpoint_of_a_run_evaluates_resumes_and_predicts(trained, shapes, tmp_path, parse):
    assert [entry["epoch"] for entry in log_lines(trained)] == [0, 1]
    stored = torch.load(trained / "checkpoint.pth", weights_only=True)["args"]
    assert (stored["model"], stored["num_classes"], stored["cls_loss_coef"]) == ("detr", 4, 1)
    source = trained / "checkpoint.pth"
    common = ("--coco_path", shapes, "--num_workers", 0, "--resume", source)
    main.main(parse(*common, "--eval", "--output_dir", tmp_path / "eval"))
    assert (tmp_path / "eval" / "detections.json").exists()
    more = ("--backbone_weights", "none", "--batch_size", 4, "--epochs", 3, "--lr_drop", 1)
    main.main(parse(*common, *more, "--output_dir", tmp_path / "more", "--min_size", 64, "--max_size", 107))
    assert log_lines(tmp_path / "more")[-1]["epoch"] == 2
    with pytest.raises(InputError, match="--model is conditional_detr now, detr in the checkpoint"):
        main.main(main.resolve(parse_flags(get_args_parser(), command(common), ParsedFlags())))
    photo = next((shapes / "images" / "val2017").iterdir())
    assert not predict.main(["--checkpoint", str(source), "--output", str(tmp_path / "found"), str(photo)])
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(found) == 8  # one per query, none of "no object"
    assert {entry["category_id"] for entry in found} <= {1, 2, 3}


def command(flags) -> list[str]:
    return ["--device", "cpu", "--model", "conditional_detr", "--eval", *map(str, flags)]


def test_published_weights_are_read_by_name_and_from_files(tmp_path, monkeypatch):
    """DETR's files hold only weights: file names tell the flags, and their digits are the start of the SHA-256."""
    asked = []
    weights = hubconf.detr_resnet50_dc5().state_dict()

    def download(url, target, hash_prefix=None, **_):
        asked.append((url, hash_prefix))
        torch.save({"model": weights}, target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert load_checkpoint("detr_resnet50_dc5")["args"] == {"model": "detr", "dilation": True}
    assert asked == [("https://dl.fbaipublicfiles.com/detr/detr-r50-dc5-f0fb7ef5.pth", "f0fb7ef5")]
    assert PUBLISHED["detr_resnet101"].url == "https://dl.fbaipublicfiles.com/detr/detr-r101-2c7b67e5.pth"
    torch.save({"model": weights}, tmp_path / "detr-r50-dc5-f0fb7ef5.pth")
    detector = load_detector(str(tmp_path / "detr-r50-dc5-f0fb7ef5.pth"))
    assert detector.args.dilation and detector.args.num_queries == 100
    assert detector.classes.names[1] == "person" and detector.model.class_embed.out_features == 92


def build(parse, model: str, num_classes: int):
    args = parse(*TINY, "--model", model, "--num_classes", num_classes)
    return build_model(args)[0], resolve(args)


def test_fine_tuning_keeps_the_row_of_no_object(parse):
    old, args = build(parse, "detr", 4)
    torch.nn.init.normal_(old.class_embed.bias)
    new, _ = build(parse, "detr", 3)
    theirs = {"model": old.state_dict(), "args": vars(args)} | Classes({1: 1, 3: 3}, {1: "cat", 3: "dog"}).state_dict()
    start_from(new, Classes({0: 0, 2: 2}, {0: "dog", 2: "cow"}), theirs, "old.pth", args)
    assert new.class_embed.bias[[0, 3]].tolist() == old.class_embed.bias[[3, 4]].tolist()


@pytest.mark.parametrize(("model", "last"), [("detr", 3), ("conditional_detr", 4)])
def test_a_checkpoint_cannot_name_more_classes_than_its_model_has(model, last, parse, tmp_path):
    """Both models have five logits; DETR's last one is "no object"."""
    network, args = build(parse, model, last + 1)
    names = {label: str(label) for label in range(last + 1)}
    contents = {
        "model": network.state_dict(),
        "args": vars(args),
        "class_names": names,
        "class_ids": {i: i for i in names},
    }
    torch.save(contents, tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth")["class_names"] == names
    contents["class_names"][last + 1], contents["class_ids"][last + 1] = "one more", last + 1
    torch.save(contents, tmp_path / "c.pth")
    with pytest.raises(InputError, match=f"names class {last + 1}, but its model has classes 0 to {last}"):
        load_checkpoint(tmp_path / "c.pth")


def test_fine_tuning_from_the_other_model_copies_the_weights_that_both_have(parse, capsys):
    old, args = build(parse, "detr", 4)
    new, _ = build(parse, "conditional_detr", 4)
    theirs = {"model": old.state_dict(), "args": vars(args)} | Classes({1: 1}, {1: "cat"}).state_dict()
    before = {name: value.clone() for name, value in new.state_dict().items()}
    start_from(new, Classes({1: 1}, {1: "cat"}), theirs, "old.pth", args)
    after = new.state_dict()
    assert torch.equal(
        after["transformer.encoder.layers.0.linear1.weight"], old.transformer.encoder.layers[0].linear1.weight
    )
    for name in ("class_embed.bias", "bbox_embed.layers.0.weight"):  # their outputs mean something else
        assert torch.equal(after[name], before[name])
    assert "random weights, because old.pth has none for this model: class_embed" in capsys.readouterr().out


def test_detections_are_the_best_class_of_each_query():
    logits = torch.tensor([[[2.0, 0, 5], [0, 3, 1], [1, 0, -9]]])  # the last is "no object"
    scores, labels, queries = SoftmaxWithNoObject().scores(logits, 100)
    assert (labels.tolist(), queries.tolist()) == ([[0, 1, 0]], [[0, 1, 2]])
    torch.testing.assert_close(scores, logits.softmax(-1)[..., :-1].max(-1).values)
    assert SoftmaxWithNoObject().scores(logits, 2)[2].tolist() == [[1, 2]]


@pytest.mark.parametrize("flags", [[], ["--postprocess"]])
def test_exported_models_find_the_same_objects(flags, trained, shapes, tmp_path, capsys):
    """The export compares its outputs with the model's; the example prints the detector's scores, without torch."""
    pytest.importorskip("onnxruntime")
    model = tmp_path / "model.onnx"
    export_onnx.main(["--checkpoint", str(trained / "checkpoint.pth"), "--output", str(model), *flags])
    photo = next((shapes / "images" / "val2017").iterdir())
    (found,) = load_detector(str(trained / "checkpoint.pth"))([read_image(photo).pixels])
    example = [sys.executable, "scripts/onnx_example.py", str(model), str(photo), "--threshold", "0"]
    printed = subprocess.run(example, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    scores = [float(line.split()[0]) for line in printed.splitlines()[1:]]
    named = [float(score) for score, label in zip(found["scores"], found["labels"], strict=True) if int(label) > 0]
    assert scores == pytest.approx(named, abs=2e-3)


def test_attention_maps_are_the_weights_that_the_model_used(trained, shapes, tmp_path):
    detector = load_detector(str(trained / "checkpoint.pth"))
    photo = next((shapes / "images" / "val2017").iterdir())
    attention = detector.model.transformer.decoder.layers[-1].multihead_attn
    with recorded(attention) as calls:
        seen = view(detector.model, detector.resize(read_image(photo).pixels))
    _, (_, weights) = calls[attention]
    maps = AttentionMaps(*(kind.flatten(-2) for kind in seen.maps))
    torch.testing.assert_close(maps.combined.mean(0), weights[0], atol=1e-6, rtol=0)
    product = maps.spatial * maps.content
    torch.testing.assert_close(product / product.sum(-1, keepdim=True), maps.combined, atol=1e-6, rtol=0)
    assert (maps.spatial - maps.content).abs().max() > 1e-3
    page = ["--image", str(photo), "--output", str(tmp_path / "page.png"), "--top", "2"]
    plot_attention.main(["--checkpoint", str(trained / "checkpoint.pth"), *page])
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_models_are_converted_to_transformers_and_back(tmp_path, parse):
    transformers = pytest.importorskip("transformers")
    args = parse("--model", "detr", "--backbone", "resnet18", "--enc_layers", 2, "--dec_layers", 1)
    model, _, _ = build_model(args)
    weights = sharpened(reference_weights(model.state_dict()))
    torch.save({"model": weights, "args": vars(args)}, tmp_path / "c.pth")
    convert.main([str(tmp_path / "c.pth"), str(tmp_path / "there"), "--to", "transformers"])
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "there").eval()
    assert theirs.config.id2label[1] == "person" and theirs.config.num_labels == 91
    model.load_state_dict(weights)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.eval()(images), theirs(pixel_values=images)
    torch.testing.assert_close(found.logits, expected["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pred_boxes, expected["pred_boxes"], atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_detector(str(tmp_path / "theirs"))
    assert (back.args.model, back.args.num_queries, len(back.classes.names)) == ("detr", 100, 80)
    for name, tensor in back.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
