"""Models in reduced precision, and the parts of them that must stay exact."""

import pytest
import torch
from torch.testing import assert_close

from models.position_encoding import PositionEmbeddingSine
from models.postprocess import PostProcess
from tests.small import build_small
from util.nested_tensor import NestedTensor

SIZES = [(64, 96), (80, 64)]
OBJECTS = {"labels": torch.tensor([1, 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.1, 0.3]])}
TARGETS = [OBJECTS | {"masks": torch.ones(2, *size, dtype=torch.uint8)} for size in SIZES]


@pytest.fixture
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_under_autocast_are_close_and_in_float32(images, dtype):
    model, _ = build_small()
    with torch.no_grad():
        expected = model(images)
        with autocast(dtype):
            outputs = model(images)
    for layer, exact in zip((outputs, *outputs["aux_outputs"]), (expected, *expected["aux_outputs"]), strict=True):
        for key in ("pred_logits", "pred_boxes"):
            assert layer[key].dtype is torch.float32
            assert_close(layer[key], exact[key], atol=0.2, rtol=0)
    assert not torch.equal(outputs["pred_logits"], expected["pred_logits"])
    assert not torch.equal(outputs["pred_boxes"], outputs["pred_boxes"].bfloat16().float())


def test_masks_under_autocast_are_close_and_in_float32(images):
    """Masks may also be computed after autocast has ended."""
    model, _ = build_small("--masks")
    queries = [torch.tensor([0, 3]), torch.tensor([5])]
    with torch.no_grad():
        expected = model(images)["masks"].of(queries)
        with autocast():
            masks = model(images)["masks"]
        found = masks.of(queries)
    assert found.dtype is torch.float32
    assert_close(found, expected, atol=0.1 * expected.std().item(), rtol=0.1)
    assert not torch.equal(found, expected)


def test_reference_points_and_position_embeddings_are_exact_under_autocast():
    model, _ = build_small()
    decoder, query_pos = model.transformer.decoder, model.query_embed.weight
    memory = torch.randn(1, 6, 256)
    cells = NestedTensor(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool))
    embedding = PositionEmbeddingSine(128, normalize=True)
    with torch.no_grad():
        _, expected = decoder(query_pos, memory, torch.zeros_like(memory), None)
        positions = embedding(cells)
        with autocast():
            _, reference = decoder(query_pos, memory, torch.zeros_like(memory), None)
            assert torch.equal(embedding(cells), positions)
    assert torch.equal(reference, expected)


@pytest.mark.parametrize("more", [(), ("--masks",)])
def test_losses_and_gradients_under_autocast_are_in_float32(more, images):
    model, criterion = build_small(*more)
    model.train()
    for inside in (True, False):  # the criterion may be called within autocast, or after it
        with autocast():
            outputs = model(images)
            losses = criterion(outputs, TARGETS) if inside else None
        losses = losses or criterion(outputs, TARGETS)
        assert all(value.dtype is torch.float32 for value in losses.values())
        sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype is torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


def test_a_model_in_bfloat16_has_close_outputs_in_float32(images):
    model, _ = build_small()
    with torch.inference_mode():
        expected = model(images)
        outputs = model.bfloat16()(images)
        floats = model((images[0] / 255)[None].bfloat16())
    for key in ("pred_logits", "pred_boxes"):
        assert outputs[key].dtype is floats[key].dtype is torch.float32
        assert_close(outputs[key], expected[key], atol=0.2, rtol=0)
    (detections, _) = PostProcess()(outputs, torch.tensor([[800, 1333]] * 2))
    assert detections["boxes"].dtype is torch.float32


def test_a_model_in_float64_has_outputs_in_float64():
    model, _ = build_small()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        outputs = model.double()(image.double())
    for key in ("pred_logits", "pred_boxes"):
        assert outputs[key].dtype is torch.float64
        assert_close(outputs[key].float(), expected[key], atol=1e-4, rtol=0)
