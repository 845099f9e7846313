"""Attention in blocks of queries, for predictions in bfloat16 on CPUs: the same values as the plain attention."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models import attention, blocked_attention
from models.attention import attend, attend_in_full, split_heads
from models.blocked_attention import attend_in_blocks

QUERIES, KEYS, HEADS = 5, 7, 4
VISIBLE = (torch.arange(KEYS) < torch.tensor([[KEYS], [4]]))[:, None, None]  # [2, 1, 1, KEYS]


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return queries, keys, which are twice as wide as values, and values of two images."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, QUERIES, HEADS * 16), (2, KEYS, HEADS * 16), (2, KEYS, HEADS * 8))
    return [split_heads(torch.randn(shape, generator=generator), HEADS).to(dtype) for shape in shapes]


@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["all", "masked"])
@pytest.mark.parametrize(("rows", "weights"), [(1, 2**20), (2, 0), (48, 2**20)])
def test_blocks_give_the_values_of_the_plain_attention(rows, weights, visible, monkeypatch):
    monkeypatch.setattr(blocked_attention, "ROWS", rows)
    monkeypatch.setattr(blocked_attention, "WEIGHTS", weights)
    exact = inputs(torch.float64)
    assert_close(attend_in_blocks(*exact, visible), attend_in_full(*exact, visible, 0.0))
    found = attend_in_blocks(*inputs(), visible)
    assert found.dtype == torch.bfloat16
    assert (found - attend_in_full(*inputs(torch.float64), visible, 0.0)).abs().max() < 0.02


def test_masked_keys_have_no_influence():
    query, key, value = inputs()
    changed = value.clone()
    changed[1, :, 4:] = 100
    assert torch.equal(attend_in_blocks(query, key, value, VISIBLE), attend_in_blocks(query, key, changed, VISIBLE))


def test_only_predictions_in_bfloat16_without_amx_use_blocks(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *given: calls.append(given) or given[2])
    with torch.no_grad():
        attend(*inputs(), None, 0.0)
        assert len(calls) == 1
        attend(*inputs(), None, 0.1)
        attend(*inputs(torch.float32), None, 0.0)
    query, key, value = inputs()
    attend(query.requires_grad_(), key, value, None, 0.0)
    torch.compile(attend, backend="eager")(*inputs(), None, 0.0)
    assert len(calls) == 1
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with torch.no_grad():
        attend(*inputs(), None, 0.0)
    assert len(calls) == 1
