"""FLOPs: PyTorch's counter and counters of traced models agree with the number that the benchmark reports."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.attention import attend
from scripts.benchmark import count_gflop
from scripts.benchmarking.model import build

CPU = torch.device("cpu")
IMAGE = torch.zeros(1, 3, 96, 128)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("r50dc5", CPU, "--no_aux_loss")[0].eval()  # the variant with the largest share of attention


@pytest.fixture(scope="module")
def gflop() -> float:
    return count_gflop("r50dc5", IMAGE.shape[-2:])


@pytest.mark.parametrize("context", [torch.no_grad(), nullcontext()], ids=["no_grad", "grad"])
def test_pytorchs_counter_agrees_with_the_benchmark(model, gflop, context):
    with context, FlopCounterMode(display=False) as counter:
        model(IMAGE)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.02)


def test_pytorchs_counter_covers_the_backward_pass_of_attention():
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        attend(query, key, value, None, 0.0).sum().backward()
    product = 2 * (2 * 3 * 5 * 7 * 8)  # multiply-adds of all heads' q kᵀ, each counted twice
    assert counter.get_total_flops() == (2 + 5) * product  # backward computes q kᵀ again


def test_a_trace_has_only_products_that_counters_know(model):
    operators = [
        node.kind() for node in torch.jit.trace(model, IMAGE, strict=False, check_trace=False).inlined_graph.nodes()
    ]
    assert operators.count("aten::matmul") == 18 * 2  # 6 encoder layers have one attention, 6 decoder layers two
    assert not {kind for kind in operators if kind.startswith("mkldnn") or "scaled_dot_product" in kind}


def test_fvcores_counter_agrees_with_the_benchmark(model, gflop):
    fvcore = pytest.importorskip("fvcore.nn")
    assert fvcore.FlopCountAnalysis(model, (IMAGE,)).total() * 2 / 1e9 == pytest.approx(gflop, rel=0.02)
