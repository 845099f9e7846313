"""Computations on a GPU agree with those on a CPU, and kernels that only GPUs have are correct.

`python -m pytest -m gpu` runs these and the other tests with that mark; they are skipped on machines without a GPU.
"""

import pytest
import torch
from torch.testing import assert_close

from models.attention import attend
from models.dropout import Dropout
from run.kernels import compile_model
from tests.conftest import TINY, assert_same_end
from tests.reference import reference_images, reference_targets
from tests.small import build_small
from util.box_ops import box_cxcywh_to_xyxy

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SIZES = [(96, 128), (128, 80)]  # of two images, which are padded to a common size


@pytest.fixture(autouse=True)
def _full_float32():
    """Switch off TF32, whose products have 10 bits of precision, so that small tolerances suffice."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def masks_of(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return masks [T, h, w] that fill the boxes [T, 4]."""
    scale = torch.tensor(size).flip(0).repeat(2)  # w, h, w, h
    x0, y0, x1, y1 = (box_cxcywh_to_xyxy(boxes) * scale)[..., None, None].unbind(1)
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    return ((columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)).to(torch.uint8)


def step(model, criterion, device, dtype) -> tuple[dict, dict, dict]:
    """Return the outputs, losses and gradients of one training step on two padded images, on the CPU."""
    model.to(device, dtype).train().zero_grad()
    images = [image.to(device, dtype) for image in reference_images(SIZES, seed=1)]
    targets = [
        {"labels": target["labels"], "boxes": target["boxes"].to(dtype), "masks": masks_of(target["boxes"], size)}
        for target, size in zip(reference_targets([3, 0], seed=1), SIZES, strict=True)
    ]
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    outputs = model(images)
    losses = criterion(outputs, targets)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
    gradients = {name: p.grad.to("cpu", copy=True) for name, p in model.named_parameters() if p.grad is not None}
    outputs = {name: outputs[name].detach().cpu() for name in ("pred_logits", "pred_boxes")}
    return outputs, {name: value.detach().cpu() for name, value in losses.items()}, gradients


@pytest.mark.parametrize(
    "flags", [(), ("--backbone_norm", "batch"), ("--backbone", "resnet50", "--dilation"), ("--masks",)]
)
def test_outputs_losses_and_gradients_match_the_cpu_in_float64(flags):
    model, criterion = build_small("--dropout", 0, *flags)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, criterion, torch.device("cpu"), torch.float64)
    model.load_state_dict(state)  # trained norms have moved their running statistics
    found = step(model, criterion, GPU, torch.float64)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert found[2].keys() == expected[2].keys()
    # The other cases compare the gradients of the detector, which are left out with a mask head.
    compared = {name: gradient for name, gradient in expected[2].items() if not name.startswith("detr.")}
    total = torch.stack([gradient.norm() for gradient in compared.values()]).norm()
    for name, gradient in compared.items():
        assert (found[2][name] - gradient).norm() < 1e-7 * total, name


def test_outputs_and_losses_match_the_cpu_in_float32():
    """Use the kernels of training in float32; gradients are not compared, as roundings at ReLUs change them."""
    model, criterion = build_small("--dropout", 0)
    expected = step(model, criterion, torch.device("cpu"), torch.float32)
    found = step(model, criterion, GPU, torch.float32)
    assert_close(found[0], expected[0], rtol=0, atol=2e-4)
    assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_16_bits_are_close_to_those_in_float32(dtype):
    model, _ = build_small("--masks")
    model.to(GPU)
    images = [image.to(GPU) for image in reference_images(SIZES, seed=1)]
    queries = [torch.tensor(chosen, device=GPU) for chosen in ([0, 5], [3])]
    with torch.no_grad():
        expected = model(images)["masks"].of(queries)
        with torch.autocast("cuda", dtype):
            found = model(images)["masks"].of(queries)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("keys", [64, 77])  # kernels read keys in groups of 8 and more
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_padded_attention_with_wide_queries_matches_the_cpu(dtype, tolerance, keys):
    """Queries and keys are twice as wide as values; two thirds of the second image's keys are padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 50, 64), (2, 8, keys, 64), (2, 8, keys, 32))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    visible = (torch.arange(keys) < torch.tensor([[keys], [keys // 3]]))[:, None, None]  # [2, 1, 1, keys]

    def attention_and_gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        y = attend(*leaves, visible.to(device), 0.0)
        y.sum().backward()
        return [tensor.detach().double().cpu() for tensor in (y, *(leaf.grad for leaf in leaves))]

    exact = attention_and_gradients("cpu", torch.float64)
    for ours, expected in zip(attention_and_gradients("cuda", dtype), exact, strict=True):
        assert (ours - expected).abs().max() < tolerance * max(expected.abs().max(), 1)
    assert not attention_and_gradients("cuda", dtype)[3][1, :, keys // 3 :].any()  # no gradient to padding


def test_dropout_drops_a_share_of_the_attention_weights():
    """Unit vectors as values make the weights visible: all are equal, and a share p of them is dropped."""
    p, keys = 0.3, 32
    query, key = torch.zeros(8, 8, 300, 64, device=GPU), torch.zeros(8, 8, keys, 64, device=GPU)
    value = torch.eye(keys, device=GPU).expand(8, 8, keys, keys).contiguous().requires_grad_()
    weights = attend(query, key, value, None, p) * keys  # [8, 8, 300, keys]
    dropped = weights == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=3e-3)
    assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / (1 - p)), rtol=1e-4, atol=0)
    direction = torch.randn_like(weights)
    (gradient,) = torch.autograd.grad(weights, value, direction)
    assert_close(gradient, weights.detach().transpose(-2, -1) @ direction, rtol=1e-4, atol=1e-3)  # same weights


def test_dropout_drops_a_share_of_the_activations():
    p, layer = 0.1, Dropout(0.1).train()
    kept = layer(torch.ones(1_000_000, device=GPU))
    assert (kept == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / (1 - p)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("more", [("--amp", "none"), ("--amp", "fp16"), ("--masks", "--amp", "bf16")])
def test_deterministic_training_repeats_and_resumes_bit_for_bit(more, shapes, tmp_path, run_main):
    """Train with dropout and trained norms; the third run resumes after its first epoch."""
    flags = [*TINY, "--device", "cuda", "--coco_path", shapes, "--deterministic", "--dropout", 0.1, *more]
    for name, runs in (("once", [2]), ("again", [2]), ("resumed", [1, 2])):
        for epochs in runs:
            done = run_main(*flags, "--epochs", epochs, "--output_dir", tmp_path / name, "--resume", "auto")
            assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "again", tmp_path / "once")
    assert_same_end(tmp_path / "resumed", tmp_path / "once")


def test_compiled_models_take_batches_of_several_shapes():
    model, _ = build_small("--enc_layers", 1, "--dec_layers", 2, "--dropout", 0)
    model.to(GPU)
    batches = [[image.to(GPU) for image in reference_images([size, (64, 64)], seed=2)] for size in SIZES]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    compile_model(model)
    with torch.no_grad():
        for batch, outputs in zip(batches, expected, strict=True):
            assert_close(model(batch), outputs, rtol=0, atol=1e-3)
    for batch in batches:
        model.train()(batch)["pred_boxes"].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
