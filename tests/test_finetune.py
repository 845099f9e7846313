"""Fine-tuning, advice at the start of a training, and learning rates for other batch sizes."""

import json

import pytest
import torch
from torch.testing import assert_close

import main
from datasets.classes import Classes
from datasets.coco_names import COCO_NAMES
from models import build_model
from run.advice import advice, lr_factor
from run.finetune import start_from
from tests.conftest import TINY
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


def classes(**names: str) -> Classes:
    labels = {int(label[1:]): name for label, name in names.items()}
    return Classes({label: label for label in labels}, labels)


@pytest.fixture
def build(parse):
    def build(*flags):
        args = parse(*TINY, *flags)
        return build_model(args)[0], args

    return build


def checkpoint(model, args, known: Classes | None = None) -> dict:
    return {"model": model.state_dict(), "args": vars(args), **(known.state_dict() if known else {})}


def test_all_weights_except_the_class_head_are_copied(build):
    old, args = build("--num_classes", 4)
    new, _ = build("--num_classes", 9)
    assert start_from(new, classes(_8="cow"), checkpoint(old, args, classes(_1="cat")), "old.pth", args)
    for name, tensor in old.state_dict().items():
        if not name.startswith("class_embed"):
            assert torch.equal(new.state_dict()[name], tensor), name


def test_rows_of_the_class_head_are_matched_by_name(build, capsys):
    """Known classes take the rows of the COCO model, whatever their ids; new classes keep their initial rows."""
    old, args = build("--num_classes", 91)
    torch.nn.init.normal_(old.class_embed.bias)
    new, _ = build("--num_classes", 4)
    before = new.class_embed.weight.clone()
    mine = classes(_0="Dog", _1="cell", _2="traffic_light", _3="PERSON")
    start_from(new, mine, checkpoint(old, args), "coco.pth", args)
    coco = {name: label for label, name in COCO_NAMES.items()}
    for label, name in ((0, "dog"), (2, "traffic light"), (3, "person")):
        assert_close(new.class_embed.weight[label], old.class_embed.weight[coco[name]])
        assert_close(new.class_embed.bias[label], old.class_embed.bias[coco[name]])
    assert torch.equal(new.class_embed.weight[1], before[1])
    assert "3 classes known by name (Dog, traffic_light, PERSON), 1 new class (cell)" in capsys.readouterr().out


def test_weights_and_flags_that_do_not_fit_are_reported(build, capsys):
    old, args = build("--num_classes", 4)
    new, more_queries = build("--num_classes", 4, "--num_queries", 9, "--dec_layers", 3)
    start_from(new, classes(_1="cat"), checkpoint(old, args, classes(_1="cat")), "old.pth", more_queries)
    report = capsys.readouterr().out
    assert "query_embed.weight is [9, 32] in the model, [8, 32] in the checkpoint" in report
    assert "--dec_layers is 3 now, 2 in the checkpoint; --num_queries is 9 now, 8 in the checkpoint" in report
    assert_close(new.transformer.decoder.layers[1].linear1.weight, old.transformer.decoder.layers[1].linear1.weight)


def test_another_width_is_accepted_and_an_unknown_model_refused(build, capsys):
    old, args = build("--num_classes", 4)
    wider, _ = build("--num_classes", 4, "--hidden_dim", 64)
    assert start_from(wider, classes(_1="cat"), checkpoint(old, args, classes(_1="cat")), "old.pth", args)
    assert "1 new class (cat)" in capsys.readouterr().out
    foreign = {"model": {"class_embed.bias": torch.zeros(4), "class_embed.weight": torch.zeros(4, 32)}, "args": {}}
    with pytest.raises(InputError, match=r"old.pth: none of its weights fits"):
        start_from(wider, classes(_1="cat"), foreign, "old.pth", args)


def test_start_from_returns_false_if_the_backbone_does_not_fit(build):
    old, args = build("--num_classes", 4, "--backbone", "resnet34")
    new, _ = build("--num_classes", 4)
    assert not start_from(new, classes(_1="cat"), checkpoint(old, args, classes(_1="cat")), "old.pth", args)


def renamed(shapes, folder) -> list[str]:
    """Write the generated annotations with strings as category ids, and return the flags for them."""
    flags = []
    for split in ("train", "val"):
        data = json.loads((shapes / "annotations" / f"instances_{split}2017.json").read_text())
        for entry in data["categories"]:
            entry["id"] = f"id of {entry['name']}"
        ids = dict(enumerate((entry["id"] for entry in data["categories"]), start=1))
        for entry in data["annotations"]:
            entry["category_id"] = ids[entry["category_id"]]
        if split == "val":
            data["categories"].reverse()
        (folder / f"{split}.json").write_text(json.dumps(data))
        flags += [f"--{split}_annotations", folder / f"{split}.json"]
        flags += [f"--{split}_images", shapes / "images" / f"{split}2017"]
    return flags


def test_a_run_fine_tunes_on_own_files_and_resumes(shapes, tmp_path, run_main):
    """Train, fine-tune on other ids of the same classes, resume and evaluate; the checkpoint keeps the classes."""
    common = [*TINY, "--epochs", 1]
    assert run_main(*common, "--coco_path", shapes, "--output_dir", tmp_path / "a").returncode == 0
    own = [*common, *renamed(shapes, tmp_path), "--output_dir", tmp_path / "b"]
    start = run_main(*own, "--finetune", tmp_path / "a" / "checkpoint.pth", "--resume", "auto")
    assert start.returncode == 0, start.stderr
    assert "3 classes known by name (circle, square, triangle)" in start.stdout
    tuned = torch.load(tmp_path / "b" / "checkpoint.pth", weights_only=True)
    assert tuned["class_ids"] == {0: "id of circle", 1: "id of square", 2: "id of triangle"}
    assert (tuned["epoch"], tuned["args"]["num_classes"]) == (0, 3)

    own[own.index("--epochs") + 1] = 2
    again = run_main(*own, "--finetune", tmp_path / "a" / "checkpoint.pth", "--resume", "auto")
    assert "1 epoch trained" in again.stdout
    assert "known by name" not in again.stdout

    scored = run_main(*own[:-2], "--eval", "--resume", tmp_path / "b" / "checkpoint.pth")
    assert scored.returncode == 0, scored.stderr
    assert "circle" in scored.stdout


@pytest.mark.parametrize("more", [("--eval",), ("--resume", "x.pth")])
def test_finetune_contradicts_eval_and_resume(more, shapes, parse):
    with pytest.raises(InputError, match="--finetune starts a new training"):
        main.main(parse(*TINY, "--coco_path", shapes, "--finetune", "y.pth", *more))


def test_lr_scale_fits_learning_rates_to_the_batch_size(parse):
    factors = {scale: lr_factor(parse("--lr_scale", scale), 4) for scale in ("none", "sqrt", "linear")}
    assert factors == {"none": 1, "sqrt": 0.5, "linear": 0.25}


def test_the_optimizer_uses_the_scaled_learning_rates(shapes, tmp_path, parse):
    main.main(parse(*TINY, "--coco_path", shapes, "--output_dir", tmp_path, "--epochs", 1, "--lr_scale", "sqrt"))
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert [group["initial_lr"] for group in saved["optimizer"]["param_groups"]] == pytest.approx([5e-5, 5e-6])
    assert saved["args"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("flags", "images", "steps", "from_scratch", "expected"),
    [
        ((), 16, 370_000, True, []),
        (("--dilation",), 8, 740_000, True, []),
        ((), 16, 500, True, ["500 steps are too few", "--finetune conditional_detr_resnet50,"]),
        (("--dilation",), 16, 500, True, ["--finetune conditional_detr_resnet50_dc5,"]),
        (("--backbone", "resnet18"), 16, 500, True, ["--finetune CHECKPOINT,"]),
        ((), 16, 500, False, []),
        ((), 16, 7_200, True, ["7,200 steps are a short training", "--lr_schedule linear"]),
        ((), 16, 10_000, True, []),
        (("--lr_schedule", "linear"), 16, 7_200, True, []),
        (("--model", "detr"), 16, 7_200, True, ["below 19,200 steps, expect", "--finetune detr_resnet50,"]),
        (("--model", "detr"), 64, 92_000, True, []),  # its published recipe
        ((), 64, 92_000, True, ["meant for 16 images per step, not 64"]),
        (("--overfit", 5), 16, 500, True, []),
        ((), 2, 370_000, True, ["meant for 16 images per step, not 2: consider --lr_scale sqrt (3.5e-05)"]),
        (("--lr_scale", "sqrt"), 2, 370_000, True, []),
        (("--lr", 3e-5), 2, 370_000, True, []),
        (("--lr_drop", 5), 16, 370_000, True, ["--lr_drop 5 divides the learning rate by ten 9 times"]),
        (("--backbone_weights", "none"), 16, 370_000, True, ["add --backbone_norm batch"]),
    ],
)
def test_advice_fits_the_flags_and_the_length_of_a_training(flags, images, steps, from_scratch, expected, parse):
    lines = advice(parse(*flags), images, steps, from_scratch)
    assert len(lines) == min(len(expected), 1)
    assert all(part in line for line in lines for part in expected)


def test_overfit_learns_a_few_images_by_heart(shapes, tmp_path, parse):
    """Training and evaluation repeat the same images, which every working set-up learns."""
    flags = ["--overfit", 2, "--epochs", 2, "--lr", 1e-3, "--lr_backbone", 1e-3, "--clip_max_norm", 0, "--dropout", 0]
    main.main(parse(*TINY, "--coco_path", shapes, "--output_dir", tmp_path, *flags))
    first, last = (json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert last["test_loss"] < first["test_loss"] < 10
    assert last["test_coco_eval_bbox"][1] > 0.5
