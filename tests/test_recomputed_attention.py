"""Attention whose weights are computed again has the bits of the plain attention, and needs less memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from models import recomputed_attention
from models.attention import attend, attend_in_full
from tests.operators import Recorder
from tests.small import small_transformer

QUERIES, KEYS = 5, 7  # an odd number of weights per head
VISIBLE = (torch.arange(KEYS) < torch.tensor([[KEYS], [4]]))[:, None, None]


@pytest.fixture(params=[1, 300, 10_000], ids=["4 heads", "8 heads", "all heads"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(recomputed_attention, "LARGE", 0)
    monkeypatch.setattr(recomputed_attention, "PART", request.param)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Return queries, keys and values as `split_heads` does."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, QUERIES, 6, 16), (2, KEYS, 6, 16), (2, KEYS, 6, 8))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return [leaf.transpose(1, 2) for leaf in leaves]


def results(function, dtype: torch.dtype, visible: Tensor | None) -> list[Tensor]:
    """Return the output, the gradients of the inputs, and a random number drawn after each of the two passes."""
    tensors = inputs(dtype)
    torch.manual_seed(0)
    output = function(*tensors, visible, 0.3)
    after_forward = torch.rand(1)
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    return [output, *gradients, after_forward, torch.rand(1)]


@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_have_the_bits_of_the_plain_attention(dtype, visible, autocast, _parts):
    with torch.autocast("cpu", enabled=autocast):
        found, expected = (results(function, dtype, visible) for function in (attend, attend_in_full))
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_the_gradients_of_a_transformer_have_the_same_bits(checkpoint_activations, _parts, monkeypatch):
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        transformer = small_transformer(dropout=0.3)
        for stack in (transformer.encoder, transformer.decoder):
            stack.checkpoint_activations = checkpoint_activations
        x, position = torch.randn(2, 2, KEYS, 16)
        hs, *_ = transformer(x, position, ~VISIBLE[:, 0, 0], torch.randn(QUERIES, 16))
        hs.square().sum().backward()
        return [parameter.grad for parameter in transformer.parameters()]

    found = gradients()
    monkeypatch.setattr(recomputed_attention, "LARGE", 10**9)
    assert_close(found, gradients(), rtol=0, atol=0)


def test_weights_are_not_stored_and_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr(recomputed_attention, "PART", 1)
    x = torch.randn(2, 4, 64, 8, requires_grad=True)
    weights_of_head = 64 * 64

    def largest(limit: int) -> tuple[int, int]:
        """Return the bytes of the largest stored tensor, and the elements of the largest computed one."""
        monkeypatch.setattr(recomputed_attention, "LARGE", limit)
        stored = []
        with Recorder() as recorder, saved_tensors_hooks(lambda x: stored.append(x.nbytes) or x, lambda x: x):
            attend(x, x, x, None, 0.3).sum().backward()
        return max(stored), recorder.largest

    assert largest(10**9) == (8 * weights_of_head * 4, 8 * weights_of_head)
    assert largest(0) == (8 * weights_of_head, 8 * weights_of_head)  # a byte per weight
