"""Frozen norms folded into convolutions: the same function, never of weights that are no longer there."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import Backbone
from tests.operators import Recorder

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def random_norms(network: nn.Module) -> nn.Module:
    """Norms as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        buffer.copy_(noise + 0.5 if name.endswith(("weight", "running_var")) else noise - 0.5)
    return network


@pytest.fixture
def body() -> nn.Module:
    torch.manual_seed(0)
    return random_norms(Backbone("resnet18", train="all")).body


def unfolded(body: nn.Module, image: Tensor = IMAGE) -> Tensor:
    """What torchvision's own modules make of a body's weights."""
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).to(body.conv1.weight.dtype)
    resnet.load_state_dict(body.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    with torch.no_grad():
        return resnet(image).view(1, 512, 2, 3)


def assert_same(values: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a part of the largest value."""
    assert_close(values, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def predict(body: nn.Module, mode: Callable = torch.no_grad) -> Tensor:
    with mode():
        return body.eval()(IMAGE.to(body.conv1.weight.dtype))


def take_step(body: nn.Module, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW(body.parameters(), lr=1e-2, fused=fused)
    body(IMAGE).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_and_gradients_are_those_of_torchvision(name):
    torch.manual_seed(0)
    body = random_norms(Backbone(name, train="all")).body.double()  # random norms amplify float32's rounding
    resnet = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double()
    resnet.load_state_dict(body.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    features, expected = body(IMAGE.double()), resnet(IMAGE.double())
    assert_same(features.flatten(1), expected, 1e-9)
    for output in (features, expected):
        output.square().mean().backward()
    gradients = {key: p.grad for key, p in resnet.named_parameters()}
    for key, parameter in body.named_parameters():
        assert_same(parameter.grad, gradients[key], 1e-9)
        assert parameter.grad.stride() == parameter.stride()  # DistributedDataParallel warns otherwise


def test_norms_add_no_pass_over_activations(body):
    predict(body)
    with torch.no_grad(), Recorder() as recorder:
        body(IMAGE)
    convolutions = [name for name in recorder.names if "convolution" in name]
    assert len(convolutions) == 20
    assert not {"mul", "add", "rsqrt"} & set(recorder.names)  # `add_` joins the residual branches


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_sums_and_relus_join_the_convolutions_on_cpus(body):
    with torch.no_grad(), Recorder() as recorder:
        body.eval()(IMAGE)
    assert recorder.names.count("relu_") == 1  # behind the first convolution
    assert "add_" not in recorder.names
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same(predict(body), unfolded(body))
    assert_same(predict(body), unfolded(body))


def test_training_computes_nothing_anew_that_does_not_learn(body):
    for part in (body.conv1, body.layer1):
        part.requires_grad_(False)
    body.train()(IMAGE)
    with Recorder() as recorder:
        body(IMAGE)
    learning = sum("conv" in name or "downsample" in name for name, p in body.named_parameters() if p.requires_grad)
    assert recorder.names.count("mul") == learning  # the weights, by scales that are kept
    assert "rsqrt" not in recorder.names


def test_a_norm_that_changes_while_training(body):
    before = body.train()(IMAGE)
    for buffer in body.layer2.buffers():
        buffer.mul_(1.5)
    after = body(IMAGE)
    assert not torch.allclose(before, after)
    assert_same(after, unfolded(body))


def test_gradients_of_the_image_through_weights_that_do_not_learn(body):
    image = IMAGE.clone().requires_grad_()
    body.requires_grad_(True)(image).square().mean().backward()
    expected, image.grad = image.grad, None
    body.requires_grad_(False)(image).square().mean().backward()
    assert_same(image.grad, expected)


def test_precisions_in_turn(body):
    """The kept weights are those of the precision that is asked for."""
    expected = predict(body)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(predict(body).float(), expected, 0.05)
    assert torch.equal(predict(body), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_between_steps(body, fused):
    predict(body)
    take_step(body.train(), fused)
    assert_same(predict(body), unfolded(body))
    take_step(body.eval(), fused)
    with torch.no_grad():  # not even a call of eval() between step and prediction
        assert_same(body(IMAGE), unfolded(body))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_after_evaluation(body, assign):
    before = predict(body)
    other = random_norms(Backbone("resnet18")).body.state_dict()
    with torch.no_grad():
        body.load_state_dict(other, assign=assign)
        after = body(IMAGE)
    assert not torch.allclose(before, after)
    assert_same(after, unfolded(body))


@pytest.mark.parametrize("change", ["conv", "norm"])
def test_loading_one_module_and_averaging_weights_after_evaluation(body, change):
    predict(body)
    with torch.no_grad():
        if change == "conv":
            torch._foreach_lerp_(list(body.parameters()), [torch.zeros_like(p) for p in body.parameters()], 0.1)
        else:
            body.bn1.load_state_dict({key: value * 2 for key, value in body.bn1.state_dict().items()})
        assert_same(body(IMAGE), unfolded(body))


def test_conversion_after_evaluation(body):
    before = predict(body)
    body.double()
    assert_same(predict(body).float(), before)
    assert predict(body).dtype is torch.float64
    assert_same(predict(body.float()), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_files_and_state_after_evaluation(body, mode):
    keys, parameters = list(body.state_dict()), sum(v.numel() for v in body.state_dict().values())
    before = predict(body, mode)
    assert list(body.state_dict()) == keys
    copied = copy.deepcopy(body)
    file = io.BytesIO()
    torch.save(body, file)
    assert file.tell() < 4.1 * parameters
    file.seek(0)
    for twin in (copied, torch.load(file, weights_only=False)):
        assert_same(predict(twin), before)
        take_step(twin.train())
        assert not torch.allclose(predict(twin), before)
        assert_same(predict(twin), unfolded(twin))
    assert_same(predict(body), before)


def test_gradients_after_inference_mode(body):
    before = predict(body, torch.inference_mode)
    with torch.no_grad():
        assert torch.equal(body(IMAGE), before)
    image = IMAGE.clone().requires_grad_()
    body.requires_grad_(False)(image).sum().backward()
    assert image.grad.any()
    take_step(body.requires_grad_(True).train())


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        body = random_norms(Backbone("resnet18")).eval().body
        before = body(IMAGE)
        body.conv1.weight.mul_(2)
        assert not torch.equal(body(IMAGE), before)
