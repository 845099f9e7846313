"""Steps that are not finite are skipped on the device, and reported with all that is needed to repeat them."""

import copy
import math
import re

import pytest
import torch

from engine import take_steps
from models import build_model
from run.kernels import use_fast_kernels
from run.optim import build_optimizer
from run.progress import Progress
from run.step import Step
from run.step_guard import StepGuard
from scripts import replay
from tests.conftest import TINY
from util.errors import InputError
from util.nested_tensor import nested_tensor_from_tensor_list


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Yield the CPU and, on machines that have one, a GPU, with the kernels of training."""
    device, precision = torch.device(request.param), torch.get_float32_matmul_precision()
    use_fast_kernels(device)
    yield device
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def parts(parse, device, request):
    """Return a small model with trained norms, its criterion, its optimizer and its flags."""
    torch.manual_seed(0)
    args = parse(*TINY, "--num_classes", 4, "--device", device, *getattr(request, "param", ()))
    model, criterion, _ = build_model(args)
    model.to(device)
    return model, criterion, build_optimizer(model, 1e-3, 1e-3, 1e-4), args


def batch(image_id: int, box: float = 0.5):
    """Return a batch of one image; its losses are not finite if the box is not."""
    generator = torch.Generator().manual_seed(image_id)
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    target = {"boxes": torch.full((1, 4), box), "labels": torch.tensor([2]), "image_id": torch.tensor([image_id])}
    return nested_tensor_from_tensor_list([image]), (target | {"masks": torch.ones(1, 64, 64, dtype=torch.uint8)},)


def train(parts, batches, epoch=0, progress=None, guard=None, scaler=None):
    model, criterion, optimizer, args = parts
    step = Step(model, criterion, optimizer, max_norm=0.1, guard=guard)
    step.scaler = scaler or step.scaler
    return take_steps(step, batches, torch.device(args.device), epoch, progress or Progress())


def full_state(parts) -> list[torch.Tensor]:
    """Return a copy of the weights, running statistics, moments and step counts."""
    model, _, optimizer, _ = parts
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return copy.deepcopy([*model.state_dict().values(), *moments])


@pytest.mark.parametrize(
    ("fused", "parts"),
    [(True, ()), (False, ()), (True, ("--masks",)), (True, ("--masks", "--frozen_weights", "x"))],
    indirect=["parts"],
)
def test_a_failing_step_changes_nothing(fused, parts):
    model, criterion, optimizer, args = parts
    if not fused:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    parts = model, criterion, optimizer, args
    train(parts, [batch(1), batch(2)])
    before = full_state(parts)
    guard = StepGuard(model, max_skipped=1)
    stats = train(parts, [batch(3, math.inf)], guard=guard)
    assert guard.skipped == 1
    assert "loss" not in stats
    assert all(torch.equal(a, b) for a, b in zip(full_state(parts), before, strict=True))


def test_skipped_steps_are_counted_reported_and_left_out_of_the_averages(parts, capsys):
    progress = Progress()
    guard = StepGuard(parts[0], max_skipped=2)
    stats = train(parts, [batch(1), batch(7, math.nan), batch(2), batch(8, math.inf)], progress=progress, guard=guard)
    assert guard.skipped == 2
    assert progress.logger.meters["loss"].count == 2
    assert all(map(math.isfinite, stats.values()))
    printed = capsys.readouterr().out
    assert "warning: not finite in epoch 0, step 1, skipped (1 of at most 2): loss nan" in printed
    assert re.search(r"step 3, skipped \(2 of at most 2\): loss (inf|nan), .* on images \[8\]", printed)
    progress.start_epoch()
    with pytest.raises(InputError, match="training diverged in epoch 1, step 0"):
        train(parts, [batch(9, math.inf)], epoch=1, progress=progress, guard=guard)


def test_the_error_names_step_losses_and_images(parts, tmp_path):
    train(parts, [batch(1)])
    before = full_state(parts)
    guard = StepGuard(parts[0], dump_dir=tmp_path)
    with pytest.raises(InputError) as error:
        train(parts, [batch(2), batch(5, math.nan), batch(3), batch(4)], epoch=6, guard=guard)
    assert re.fullmatch(
        r"training diverged in epoch 6, step 1, weights are as before: loss nan, loss_ce [\d.]+, loss_bbox nan, "
        r"loss_giou nan, gradient norm nan on images \[5\]; repeat it by python -m scripts.replay .*"
        r"nonfinite-epoch0006-step000001-process0.pth; lower --lr, or .* --skip_nonfinite N",
        str(error.value),
    )
    assert not all(torch.equal(a, b) for a, b in zip(full_state(parts), before, strict=True))  # step 0 was taken


@pytest.mark.parametrize("parts", [("--masks",)], indirect=True)
def test_the_error_names_losses_of_masks(parts):
    parts[0].mask_head.out_lay.bias.data.fill_(math.nan)
    with pytest.raises(InputError, match=r"loss nan, .* loss_giou [\d.]+, loss_mask nan, loss_dice nan, gradient norm"):
        train(parts, [batch(1)])


def test_a_gradient_that_is_not_finite_is_found_although_losses_are_finite(parts):
    model = parts[0]
    handle = model.query_embed.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match=r"loss [\d.]+, .* gradient norm (inf|nan)"):
        train(parts, [batch(1)])
    handle.remove()


def test_float16_gradients_that_overflow_only_lower_the_loss_scale(parts):
    scaler = torch.amp.GradScaler(parts[3].device, init_scale=2.0**127)
    guard = StepGuard(parts[0])
    before = full_state(parts)
    train(parts, [batch(1)], guard=guard, scaler=scaler)
    assert guard.skipped == 0
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(full_state(parts), before, strict=False))
    with pytest.raises(InputError, match="training diverged"):
        train(parts, [batch(2, math.nan)], guard=guard, scaler=scaler)


def test_a_dump_repeats_the_step(parts, tmp_path, capsys):
    model, _, _, args = parts
    guard = StepGuard(model, dump_dir=tmp_path, description={"args": vars(args)})
    with pytest.raises(InputError):
        train(parts, [batch(1), batch(2, math.nan)], guard=guard)
    (dump,) = tmp_path.iterdir()
    replay.main(["--device", args.device, str(dump)])
    printed = capsys.readouterr().out
    assert "epoch 0, step 1, process 0, images [2]" in printed
    recorded = torch.load(dump, weights_only=True)["losses"]
    assert f"loss_ce {recorded['loss_ce'].item():g} (recorded: {recorded['loss_ce'].item():g})" in printed
    assert "loss_bbox nan (recorded: nan)" in printed
    assert "the outputs of all modules are finite: look at the targets" in printed
