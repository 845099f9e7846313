"""Averaged weights (--ema_decay): their values, the checkpoints with them, and the commands that use them."""

import copy

import pytest
import torch
from torch import nn

import main
from checkpoints.checkpoint import load_checkpoint
from run.average import MovingAverage
from run.step import Step
from run.step_guard import StepGuard
from tests.conftest import TINY, flags, log_lines, train
from tests.two_processes import images_and_targets, random_model
from util.errors import InputError
from util.nested_tensor import nested_tensor_from_tensor_list

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def averaged(shapes, tmp_path):
    """The folder of a run of two epochs with averaged weights."""
    train(shapes, tmp_path / "averaged", "--epochs", 2, "--ema_decay", 0.9)
    return tmp_path / "averaged"


def read(path) -> dict:
    return torch.load(path, weights_only=True)


def differences(ours: dict, theirs: dict) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


def test_the_average_follows_the_taken_steps():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = MovingAverage(model, 0.6)
    expected = {name: value.double() for name, value in copy.deepcopy(model.state_dict()).items()}
    taken = 0
    for left_out in (0, 0, 1, 0, 1, 0, 0, 0, 0, 0):
        for value in (*model.parameters(), *model.buffers()):
            value.data = torch.rand_like(value) if value.is_floating_point() else value + 1
        average.update(torch.tensor(left_out))
        if not left_out:
            taken += 1
            keep = min(0.6, (1 + taken) / (10 + taken))
            for name, value in model.state_dict().items():
                expected[name] = keep * expected[name] + (1 - keep) * value
    assert average.state_dict()["steps"] == taken == 8
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in average.model.parameters())
    assert not average.model.training


def test_a_skipped_step_does_not_change_the_average(parse):
    """Neither weights nor statistics of norms change; the next step changes them again."""
    model, criterion = random_model(parse(*TINY, "--num_classes", 4), seed=1)
    average = MovingAverage(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = Step(model.train(), criterion, optimizer, guard=StepGuard(model, 1), average=average)
    images, targets = images_and_targets((1, 2))
    broken = [target | {"boxes": target["boxes"] * float("inf")} for target in targets]

    for wanted, count in ((targets, 1), (broken, 1), (targets, 2)):
        before = copy.deepcopy(average.model.state_dict())
        _, left_out = step([(nested_tensor_from_tensor_list(images), wanted)])
        step.settle()
        changed = differences(average.model.state_dict(), before)
        assert bool(changed) == (not left_out) == (wanted is targets)
        assert average.state_dict()["steps"] == count


def test_contents_of_checkpoints(shapes, averaged, tmp_path):
    """The raw weights are those of a run without an average, bit for bit; the best model is the average."""
    train(shapes, tmp_path / "raw", "--epochs", 2)
    checkpoint, best = (read(averaged / f"checkpoint{name}.pth") for name in ("", "_best"))
    assert not differences(checkpoint["model"], read(tmp_path / "raw" / "checkpoint.pth")["model"])
    assert checkpoint["ema"]["steps"] == 6
    assert differences(checkpoint["ema"]["model"], checkpoint["model"])
    assert "ema" not in best
    if best["epoch"] == 1:
        assert not differences(best["model"], checkpoint["ema"]["model"])


def test_evaluation_and_finetuning_use_the_average_and_say_so(shapes, averaged, tmp_path, capsys):
    source = averaged / "checkpoint.pth"
    line = f"{source}: taking the averaged weights in ema.model, not those in model"
    capsys.readouterr()
    main.main(main.get_args_parser().parse_args(flags(shapes, "--eval", "--resume", source)))
    printed = capsys.readouterr().out
    assert line in printed
    assert f"= {log_lines(averaged)[-1]['test_coco_eval_bbox'][0]:.3f}" in printed
    train(shapes, tmp_path / "finetuned", "--epochs", 1, "--finetune", source, "--lr", 1e-12, "--lr_backbone", 0)
    assert line in capsys.readouterr().out
    ours, average = read(tmp_path / "finetuned" / "checkpoint.pth")["model"], load_checkpoint(source)["model"]
    assert all((ours[name] - average[name]).abs().max() < 1e-6 for name in ours if name.startswith("bbox_embed"))


def test_resuming_with_and_without_the_average(shapes, averaged, tmp_path, capsys):
    """Without the flag, a run continues from the raw weights; a run that had no average starts one from its weights."""
    source = averaged / "checkpoint.pth"
    capsys.readouterr()
    train(shapes, tmp_path / "off", "--epochs", 3, "--resume", source)
    printed = capsys.readouterr().out
    assert "continuing from" in printed and "--ema_decay is 0 now, 0.9 in the checkpoint" in printed
    assert "taking" not in printed
    checkpoint = read(tmp_path / "off" / "checkpoint.pth")
    assert "ema" not in checkpoint
    train(shapes, tmp_path / "on", "--epochs", 4, "--resume", tmp_path / "off" / "checkpoint.pth", "--ema_decay", 0.5)
    assert read(tmp_path / "on" / "checkpoint.pth")["ema"]["steps"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ema: ema["model"].pop("class_embed.bias"), "class_embed.bias is [4] in the model, missing in the file"),
        (lambda ema: ema.pop("steps"), "ema has no 'steps'"),
        (lambda ema: ema.update(steps=-1), "ema.steps is -1"),
        (lambda ema: ema.update(model=3), "ema.model is 3"),
    ],
)
def test_an_average_that_cannot_be_continued(change, message, shapes, averaged, tmp_path):
    checkpoint = read(averaged / "checkpoint.pth")
    change(checkpoint["ema"])
    torch.save(checkpoint, tmp_path / "changed.pth")
    with pytest.raises(InputError) as error:
        train(shapes, tmp_path / "on", "--epochs", 3, "--resume", tmp_path / "changed.pth", "--ema_decay", 0.9)
    assert message in str(error.value)
