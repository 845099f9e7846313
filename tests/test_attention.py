"""Attention: every kernel computes the paper's formula, and stores the matrix of weights only if it has to."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models import attention
from models.attention import attend
from models.dropout import Dropout, dropout
from tests.operators import Recorder
from tests.small import build_small, small_transformer
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list


def inputs(width: int, dtype: torch.dtype = torch.float32, queries: int = 5, keys: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def visible_keys(keys: int = 7) -> Tensor:
    return (torch.arange(keys) < torch.tensor([[keys], [4]]))[:, None, None]


def formula(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return (logits if visible is None else logits.masked_fill(~visible, -torch.inf)).softmax(-1) @ value


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("visible", [None, visible_keys()], ids=["all", "masked"])
@pytest.mark.parametrize("p", [0.0, 1e-9], ids=["fused", "matrix"])
def test_the_formula_and_its_gradients(width, visible, p):
    ours, theirs = inputs(width), inputs(width)
    result, expected = attend(*ours, visible, p), formula(*theirs, visible)
    assert_close(result, expected)
    for output in (result, expected):
        output.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("visible", [None, visible_keys(200)], ids=["all", "masked"])
def test_attention_without_dropout_has_no_matrix_of_weights(width, dtype, visible):
    with Recorder() as recorder:
        attend(*inputs(width, dtype, queries=100, keys=200), visible, 0.0)
    assert recorder.largest <= 2 * 3 * 200 * width  # the size of the keys


def test_dropout_of_weights_keeps_the_input_precision():
    with Recorder() as recorder:
        result = attend(*inputs(16, torch.bfloat16, queries=100, keys=200), visible_keys(200), 0.5)
    assert result.dtype is torch.bfloat16
    assert recorder.largest_bytes == 2 * (2 * 3 * 100 * 200)  # the matrix, with two bytes per weight
    torch.manual_seed(0)
    repeated = [t.detach().repeat(10_000, 1, 1, 1) for t in (*inputs(16), visible_keys())]
    means = attend(*repeated, 0.5).unflatten(0, (10_000, 2)).mean(0)
    assert_close(means, formula(*inputs(16), visible_keys()), atol=0.05, rtol=0)


def test_training_without_dropout_stores_no_matrix_of_weights():
    cells, queries = 400, 10
    transformer = small_transformer()
    x, position = torch.randn(2, 1, cells, 16)
    with Recorder() as recorder:
        hs, *_ = transformer(x, position, torch.zeros(1, cells, dtype=torch.bool), torch.randn(queries, 16))
        hs.sum().backward()
    assert recorder.largest == cells * 32  # of the feed-forward network; the matrix of one head would have 400²


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4, 100_001, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    kept = y.detach().float()
    assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / (1 - p)), rtol=5e-3, atol=0)
    for lane in range(4):  # four elements share a random number
        assert (kept.flatten()[lane::4] == 0).float().mean().item() == pytest.approx(p, abs=6e-3)
    module = Dropout(p)
    assert (module(x) == 0).any()
    assert module.eval()(x) is x


def test_a_batch_knows_whether_it_is_padded(monkeypatch):
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    for sizes, expected in (([(8, 6), (8, 6)], False), ([(8, 6), (8, 5)], True), ([(8, 6)], False)):
        batch = nested_tensor_from_tensor_list([torch.ones(3, *size) for size in sizes])
        assert batch.has_padding is expected
        assert batch.mask.any().item() is expected
        assert batch.to("cpu").has_padding is expected
        assert batch.pin_memory().has_padding is expected
    assert NestedTensor(batch.tensors, batch.mask).has_padding


def test_attention_is_masked_only_with_padding(monkeypatch):
    model, _ = build_small()
    masks = []

    def noted(query, key, value, visible, p):
        masks.append(visible is not None)
        return attend(query, key, value, visible, p)

    monkeypatch.setattr(attention, "attend", noted)
    images = [torch.randn(3, 64, 96), torch.randn(3, 64, 64)]
    for samples, masked in ((images, True), (images[:1], False)):
        masks.clear()
        with torch.no_grad():
            model(samples)
        assert masks == [masked] * 2 + [False, masked] * 3  # the self-attention of queries needs no mask


def test_a_batch_that_does_not_know_whether_it_is_padded():
    model, _ = build_small()
    padded = nested_tensor_from_tensor_list([torch.randn(3, 64, 96), torch.randn(3, 64, 64)])
    full = nested_tensor_from_tensor_list([torch.randn(3, 64, 96)] * 2)
    with torch.no_grad():
        for batch in (padded, full):
            outputs = model(NestedTensor(batch.tensors, batch.mask))
            assert_close(outputs["pred_logits"], model(batch)["pred_logits"])
