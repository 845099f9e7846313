"""Frozen norms folded into convolutions: they compute the same, without extra passes over activations."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import Backbone
from models.folded_norms import FoldedConv2d
from tests.folded import IMAGE, assert_same, features, make_body, predict, random_norms, unfolded
from tests.operators import Recorder


@pytest.fixture
def body() -> nn.Module:
    return make_body()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_and_gradients_are_those_of_torchvision(name):
    torch.manual_seed(0)
    body = random_norms(Backbone(name, train_stem=True)).body.double()  # random norms amplify float32's rounding
    resnet = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double()
    resnet.load_state_dict(body.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    found, expected = features(body, IMAGE.double()), resnet(IMAGE.double())
    assert_same(found.flatten(1), expected, 1e-9)
    for output in (found, expected):
        output.square().mean().backward()
    gradients = {key: p.grad for key, p in resnet.named_parameters()}
    for key, parameter in body.named_parameters():
        assert_same(parameter.grad, gradients[key], 1e-9)
        assert parameter.grad.stride() == parameter.stride()  # DistributedDataParallel warns otherwise


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_norms_add_no_pass_over_activations(mode, body):
    """Each convolution writes its folded weights, in two steps, and its activations, at most once."""
    convolutions = [module for module in body.modules() if isinstance(module, FoldedConv2d)]
    activations = []
    for module in convolutions:
        module.register_forward_hook(lambda module, inputs, output: activations.append(output.numel()))
    with mode(), Recorder() as recorder:
        body(IMAGE)
    assert len(activations) == len(convolutions) == 20
    assert recorder.written - 2 * sum(module.weight.numel() for module in convolutions) <= sum(activations)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sums_and_relus_are_fused_into_convolutions_on_cpus(body, mode):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        predict(body, mode)
    names = [event.name for event in profile.events()]
    assert sum(name.startswith("mkldnn::_convolution_pointwise") for name in names) == 20
    assert names.count("aten::relu_") == 1  # after the first convolution and the pooling
    assert "aten::add_" not in names
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same(predict(body), unfolded(body))
    assert_same(predict(body), unfolded(body))


@torch.no_grad()
def test_sums_overwrite_only_activations_that_nobody_else_can_see(body):
    """Hooks keep the activations of their call, and modules that are called alone do not change their input."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stages = body(IMAGE)
    in_place = [event for event in profile.events() if event.name == "mkldnn::_convolution_pointwise_"]
    if torch.backends.mkldnn.is_available():
        assert len(in_place) == 8  # one per block
    for module, x in ((body.layer1, stages["layer1"]), (body.layer2[1], stages["layer2"])):
        before = x.clone()
        module(x)
        assert torch.equal(x, before)

    seen = []
    modules = {f"{kind}.{name}": m for name, m in body.named_modules() for kind in ("before", "after") if name}
    for name, module in modules.items():
        if name.startswith("before"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
        else:
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, output)))
    body(IMAGE)
    kept = dict(seen)
    with torch.backends.mkldnn.flags(enabled=False):  # its plain operators overwrite no sums
        body(IMAGE)
    assert len(kept) > 50
    for name, activation in seen[len(seen) // 2 :]:
        if not name.startswith(("before.relu", "after.maxpool")):  # this ReLU is always in place
            assert_same(kept[name], activation)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_block_alone_takes_any_format_and_precision(body, memory_format):
    x = torch.randn(2, 64, 6, 5).contiguous(memory_format=memory_format)
    for precision, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            found = body.layer1[0](x)
            with torch.backends.mkldnn.flags(enabled=False):
                expected = body.layer1[0](x)
        assert found.dtype == expected.dtype == precision
        assert_same(found, expected, tolerance)


def test_modules_that_are_called_alone_compute_the_same(body):
    with torch.no_grad():
        x = body.maxpool(torch.relu(body.bn1(body.conv1(IMAGE))))
        for stage in (body.layer1, body.layer2, body.layer3):
            x = stage(x)
        for block in body.layer4:
            x = block(x)
        assert_same(x, unfolded(body))


def test_changed_norms_take_effect_at_once(body):
    before = features(body.train())
    for buffer in body.layer2.buffers():
        buffer.mul_(1.5)
    after = features(body)
    assert not torch.allclose(before, after)
    assert_same(after, unfolded(body))


def test_frozen_weights_pass_the_same_gradients_to_the_image(body):
    image = IMAGE.clone().requires_grad_()
    features(body.requires_grad_(True), image).square().mean().backward()
    expected, image.grad = image.grad, None
    features(body.requires_grad_(False), image).square().mean().backward()
    assert_same(image.grad, expected)


def test_autocast_does_not_change_later_predictions(body):
    expected = predict(body)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(predict(body).float(), expected, 0.05)
    assert torch.equal(predict(body), expected)
