"""scripts.replay repeats a failed step exactly, and says where it starts to fail."""

import math

import pytest
import torch

from engine import take_steps
from models import build_model
from run.optim import build_optimizer
from run.progress import Progress
from run.step import Step
from run.step_guard import StepGuard
from scripts import replay
from tests.conftest import TINY
from util.errors import InputError
from util.nested_tensor import nested_tensor_from_tensor_list

CPU = ("--device", "cpu")


def batch(image_id: int, boxes: int = 2, size: float = 0.5):
    """Return a batch of one image; its losses are not finite if the size of its boxes is not."""
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(image_id))
    target = {"boxes": torch.full((boxes, 4), size), "labels": torch.arange(boxes), "image_id": torch.tensor(image_id)}
    masks = torch.ones(boxes, 64, 64, dtype=torch.uint8)
    return nested_tensor_from_tensor_list([image]), (target | {"masks": masks},)


@pytest.fixture
def fail(parse, tmp_path):
    """Train on batches until the last step fails, and return the dump of that step."""

    def fail(batches, *flags, change=lambda model: None):
        args = parse(*TINY, "--num_classes", 4, *flags)
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        change(model)
        optimizer = build_optimizer(model, 1e-3, 1e-3, 1e-4)
        guard = StepGuard(model, dump_dir=tmp_path, description={"args": vars(args)})
        with pytest.raises(InputError, match="training diverged"):
            step = Step(model, criterion, optimizer, 0.1, args.amp, args.accum_steps, guard)
            take_steps(step, batches, torch.device("cpu"), 0, Progress())
        (dump,) = tmp_path.iterdir()
        return dump

    return fail


@pytest.mark.parametrize(
    ("amp", "more"),
    [("none", ()), ("bf16", ()), ("bf16", ("--masks",)), ("none", ("--masks", "--frozen_weights", "x"))],
)
def test_a_step_of_several_batches_is_repeated_exactly(amp, more, fail, capsys):
    """The step has dropout, and follows one that has changed the weights."""
    batches = [batch(1), batch(2), batch(3, boxes=1), batch(4, boxes=3, size=math.nan)]
    dump = fail(batches, "--accum_steps", 2, "--dropout", 0.3, "--amp", amp, *more)
    replay.main([str(dump), *CPU])
    printed = capsys.readouterr().out
    recorded = torch.load(dump, weights_only=True)["losses"]
    assert recorded["loss_ce"].isfinite()
    for name in ("loss_ce", "gradient norm"):  # the gradient norm is finite if boxes are frozen
        assert f"  {name} {recorded[name]:g} (recorded: {recorded[name]:g})" in printed
    assert "all losses equal the recorded ones bit for bit" in printed
    assert "look at the targets" in printed


def test_a_mask_head_that_fails_is_named(fail, capsys):
    def spoil(model):
        model.mask_head.lay3.bias.data[0] = math.nan

    replay.main([str(fail([batch(1)], "--masks", change=spoil)), *CPU])
    printed = capsys.readouterr().out
    assert "  loss_mask nan (recorded: nan)" in printed
    assert "all losses equal the recorded ones bit for bit" in printed
    assert "the first module whose output is not finite: mask_head.lay3" in printed


def test_a_gradient_norm_that_fails_although_losses_are_finite_is_explained(fail, capsys):
    def enlarge(model):
        with torch.no_grad():  # outputs do not change, but the gradient of the second layer grows
            model.bbox_embed.layers[0].weight.mul_(1e30)
            model.bbox_embed.layers[0].bias.mul_(1e30)
            model.bbox_embed.layers[1].weight.div_(1e30)
            torch.nn.init.normal_(model.bbox_embed.layers[2].weight)

    replay.main([str(fail([batch(1)], change=enlarge)), *CPU])
    printed = capsys.readouterr().out
    assert "  gradient norm inf (recorded: inf)" in printed
    assert "all losses equal the recorded ones bit for bit" in printed
    assert "all losses and gradients are finite, but the gradients are too large for their norm" in printed


def test_a_replay_that_differs_from_the_run_gives_a_warning(fail, capsys):
    dump = fail([batch(1, size=math.inf)])
    contents = torch.load(dump, weights_only=True)
    contents["num_boxes"] += 1
    torch.save(contents, dump)
    replay.main([str(dump), *CPU])
    assert "warning: the replay differs from the run in loss_ce, " in capsys.readouterr().out


@pytest.mark.parametrize("contents", [{"model": {}}, [1, 2], {"place": {}, "model": {}, "batches": []}])
def test_other_files_are_refused(contents, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(contents, path)
    with pytest.raises(InputError, match=r"other\.pth: (not the dump of a step|has no 'args')"):
        replay.main([str(path), *CPU])
