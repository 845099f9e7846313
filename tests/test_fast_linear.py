"""Linear layers by oneDNN: they compute the same as PyTorch's, and are used only in predictions on CPUs."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from models.fast_linear import FastLinear, use_fast_linear
from tests.small import build_small

ONEDNN = "mkldnn::_linear_pointwise"
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def layers(bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return PyTorch's layer and ours with the same weights."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 24, bias)
    fast = nn.Sequential(nn.Linear(16, 24, bias))
    fast[0].load_state_dict(plain.state_dict())
    use_fast_linear(fast)
    assert type(fast[0]) is FastLinear
    return plain, fast[0]


def operators(layer: nn.Module, x: Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return [event.name for event in profile.events()]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_onednn_computes_the_same_values(bias, mode):
    plain, fast = layers(bias)
    inputs = torch.randn(5, 16), torch.randn(2, 5, 16), torch.randn(2, 16, 5).mT, torch.randn(1, 16).expand(5, -1)
    with mode():
        for x in inputs:
            assert_close(fast(x), plain(x))
            assert ONEDNN in operators(fast, x)
        for x in (torch.randn(16), torch.randn(0, 16), torch.randn(3, 0, 16)):
            assert_close(fast(x), plain(x))


@needs_onednn
def test_other_inputs_and_modes_use_pytorchs_layer():
    plain, fast = layers()
    x = torch.randn(5, 16)
    assert ONEDNN not in operators(fast, x)  # with gradients
    fast(x).sum().backward()
    plain(x).sum().backward()
    assert_close(fast.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert_close(torch.func.vmap(fast)(x), plain(x))
        assert_close(fast.double()(x.double()), plain.double()(x.double()))
        fast.float().weight.set_(torch.randn(16, 24).T)
        assert ONEDNN not in operators(fast, x)  # slow with transposed weights
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype is torch.bfloat16
        with pytest.raises(RuntimeError):  # weights and inputs of different types
            fast(x.double())


@needs_onednn
def test_models_predict_the_same_by_onednn():
    model, _ = build_small()
    assert not any(type(module) is nn.Linear for module in model.modules())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert ONEDNN in operators(model.eval(), x)
        found = model(x)
        with torch.backends.mkldnn.flags(enabled=False):
            expected = model(x)
    for name in ("pred_logits", "pred_boxes"):
        assert_close(found[name], expected[name], rtol=0, atol=1e-4)
