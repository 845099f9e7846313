"""Group DETR: groups of queries in training, a plain model everywhere else."""

import shutil

import pytest
import torch
from torch.testing import assert_close

import main
from datasets.classes import Classes
from models import build_model
from run.finetune import start_from
from scripts import convert
from scripts.detector import load_detector
from tests.conftest import TINY, flags, train
from tests.reference import reference_images, reference_targets
from tests.small import build_small
from util.errors import InputError

SIZES = [(64, 96), (64, 80)]
LABELS = 4


@pytest.fixture
def targets():
    return [
        {"labels": target["labels"] % LABELS, "boxes": target["boxes"]} for target in reference_targets([3, 2], seed=1)
    ]


def test_groups_are_independent(targets):
    """Each group predicts what a model with only its queries predicts; losses are means over the groups."""
    model, criterion = build_small("--group_detr", 3, "--num_classes", LABELS, "--dropout", 0)
    images = reference_images(SIZES, seed=1)
    outputs = model.train()(images)
    losses = criterion.train()(outputs, targets)
    rows = model.query_embed.weight.shape[0] // 3
    plain, plain_criterion = build_small("--num_classes", LABELS, "--dropout", 0)
    weights = model.state_dict()
    expected = []
    for group in range(3):
        of_group = slice(group * rows, (group + 1) * rows)
        plain.load_state_dict(weights | {"query_embed.weight": weights["query_embed.weight"][of_group]})
        alone = plain.train()(images)
        for name in ("pred_logits", "pred_boxes"):
            assert_close(outputs[name][:, of_group], alone[name], atol=1e-5, rtol=0)
        expected.append(plain_criterion(alone, targets))
    for name in criterion.weight_dict:
        mean = torch.stack([of_group[name] for of_group in expected]).mean()
        assert_close(losses[name], mean, atol=1e-5, rtol=1e-5, msg=name)


def test_evaluation_uses_the_first_group(targets):
    model, criterion = build_small("--group_detr", 3, "--num_classes", LABELS)
    images = reference_images(SIZES, seed=1)
    plain, plain_criterion = build_small("--num_classes", LABELS)
    weights = model.state_dict()
    first = weights["query_embed.weight"][: plain.query_embed.num_embeddings]
    plain.load_state_dict(weights | {"query_embed.weight": first})
    with torch.no_grad():
        outputs, expected = model.eval()(images), plain.eval()(images)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(outputs[name], expected[name])
    losses, expected = criterion.eval()(outputs, targets), plain_criterion.eval()(expected, targets)
    assert {name: value.item() for name, value in losses.items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_losses_without_boxes_are_divided_by_one(targets):
    model, criterion = build_small("--group_detr", 2, "--num_classes", LABELS, "--dropout", 0)
    empty = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)} for _ in SIZES]
    outputs = model.train()(reference_images(SIZES, seed=1))
    losses = criterion.train()(outputs, empty)
    assert losses["loss_bbox"] == losses["loss_giou"] == 0
    criterion.num_groups = 1
    assert_close(losses["loss_ce"], criterion(outputs, empty)["loss_ce"])


def test_other_models_refuse_groups(parse):
    with pytest.raises(InputError, match="--group_detr 2: only conditional_detr trains groups of queries"):
        build_model(parse("--model", "detr", "--group_detr", "2"))


@pytest.fixture(scope="module")
def in_groups(shapes, tmp_path_factory):
    """Train for one epoch with three groups, and return the folder of the run."""
    output = tmp_path_factory.mktemp("groups")
    train(shapes, output, "--group_detr", 3, "--epochs", 1)
    return output


def test_tools_see_a_plain_model(in_groups, shapes, tmp_path, capsys):
    """Tools use the first 8 of 24 queries, and the AP is that of the evaluation during training."""
    checkpoint = in_groups / "checkpoint.pth"
    queries = torch.load(checkpoint, weights_only=True)["model"]["query_embed.weight"]
    assert queries.shape[0] == 24
    detector = load_detector(str(checkpoint))
    assert torch.equal(detector.model.query_embed.weight, queries[:8])
    convert.main([str(checkpoint), str(tmp_path / "plain.safetensors"), "--to", "safetensors"])
    for source, more in ((checkpoint, ()), (checkpoint, ("--group_detr", 3)), (tmp_path / "plain.safetensors", ())):
        main.main(
            main.get_args_parser().parse_args(
                flags(shapes, "--eval", "--resume", source, "--output_dir", tmp_path / "eval", *more)
            )
        )
        stats = torch.load(tmp_path / "eval" / "eval.pth", weights_only=True)["precision"]
        assert torch.equal(torch.as_tensor(stats), torch.as_tensor(precision_of(in_groups)))


def precision_of(output):
    return torch.load(output / "eval" / "latest.pth", weights_only=True)["precision"]


def test_training_resumes_only_with_the_same_number_of_groups(in_groups, shapes, tmp_path):
    output = shutil.copytree(in_groups, tmp_path / "run")
    with pytest.raises(InputError, match="--group_detr is 2 now, 3 in the checkpoint"):
        train(shapes, output, "--group_detr", 2, "--epochs", 2, "--resume", "auto")
    train(shapes, output, "--epochs", 2, "--resume", "auto")  # with the number of groups of the checkpoint
    weights = torch.load(output / "checkpoint.pth", weights_only=True)["model"]
    assert weights["query_embed.weight"].shape[0] == 24


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2), (2, 2)])
def test_fine_tuning_keeps_the_first_groups(before, after, parse, capsys):
    old, args = (build_model(parse(*TINY, "--group_detr", before))[0], parse(*TINY, "--group_detr", before))
    new, new_args = build_model(parse(*TINY, "--group_detr", after))[0], parse(*TINY, "--group_detr", after)
    drawn = new.query_embed.weight.clone()
    checkpoint = {"model": old.state_dict(), "args": vars(args)}
    start_from(new, Classes({1: 1}, {1: "cat"}), checkpoint, "old.pth", new_args)
    kept = 8 * min(before, after)
    assert torch.equal(new.query_embed.weight[:kept], old.query_embed.weight[:kept])
    assert torch.equal(new.query_embed.weight[kept:], drawn[kept:])
    line = f"groups of queries: {after} instead of {before}; the first {min(before, after)} are kept"
    assert (line in capsys.readouterr().out) == (before != after)


@pytest.mark.parametrize("groups", [0, 5, 2.5, "three", [3], 10**9])
def test_a_checkpoint_with_an_impossible_number_of_groups_is_refused(groups, in_groups, tmp_path):
    checkpoint = torch.load(in_groups / "checkpoint.pth", weights_only=True)
    checkpoint["args"]["group_detr"] = groups
    torch.save(checkpoint, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"odd\.pth.*group_detr"):
        load_detector(str(tmp_path / "odd.pth"))
