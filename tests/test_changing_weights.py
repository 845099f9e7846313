"""A model always predicts with its current weights, no matter how they were changed."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.backbone import Backbone
from tests.folded import IMAGE, assert_same, features, make_body, predict, random_norms, take_step, unfolded


@pytest.fixture
def body() -> nn.Module:
    return make_body()


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_between_steps(body, fused):
    predict(body)
    take_step(body.train(), fused)
    assert_same(predict(body), unfolded(body))
    take_step(body.eval(), fused)
    with torch.no_grad():  # without a call of eval() between step and prediction
        assert_same(features(body), unfolded(body))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_after_evaluation(body, assign):
    before = predict(body)
    other = random_norms(Backbone("resnet18")).body.state_dict()
    with torch.no_grad():
        body.load_state_dict(other, assign=assign)
        after = features(body)
    assert not torch.allclose(before, after)
    assert_same(after, unfolded(body))


def set_data(body: nn.Module) -> None:
    for parameter in body.parameters():
        parameter.data = parameter.data * 1.1


def copy_data(body: nn.Module) -> None:
    """Change the weights in the way of `torch_ema` and timm's ModelEma."""
    for tensor in (*body.parameters(), *body.buffers()):
        tensor.data.copy_(tensor.data * 0.9 + 0.05)


def lerp_all(body: nn.Module) -> None:
    tensors = [*body.parameters(), *body.buffers()]
    torch._foreach_lerp_([t.data for t in tensors], [torch.full_like(t, 0.1) for t in tensors], 0.1)


def vector(body: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(body.parameters()) * 1.1, body.parameters())


def swap(body: nn.Module) -> None:
    for module in list(body.modules()):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                other = nn.Parameter(tensor * 1.1) if name in module._parameters else tensor * 1.1
                torch.utils.swap_tensors(tensor, other)


def through_numpy(body: nn.Module) -> None:
    for tensor in (*body.parameters(), *body.buffers()):
        tensor.detach().numpy()[...] *= 1.1


def load_one_norm(body: nn.Module) -> None:
    body.bn1.load_state_dict({key: value * 2 for key, value in body.bn1.state_dict().items()})


def empty_and_load(body: nn.Module) -> None:
    state = {key: value * 1.1 for key, value in body.state_dict().items()}
    body.to_empty(device="cpu").load_state_dict(state, strict=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change", [set_data, copy_data, lerp_all, vector, swap, through_numpy, load_one_norm, empty_and_load]
)
def test_weights_that_change_between_predictions(body, change, mode):
    before = predict(body, mode)
    with torch.no_grad():
        change(body)
    with mode():  # without a call of eval(), which could reveal the change
        after = features(body)
    assert not torch.allclose(before, after)
    assert_same(after, unfolded(body))


@torch.no_grad()
def test_weights_of_another_model_by_functional_call(body):
    before = predict(body)
    other = {key: value * 1.1 for key, value in body.state_dict().items()}
    found = torch.func.functional_call(body, other, (IMAGE,))["layer4"]
    assert torch.equal(predict(body), before)
    body.load_state_dict(other)
    assert_same(found, unfolded(body))


@torch.no_grad()
def test_replicas_use_their_own_weights(body):
    """Replicas of DataParallel are modules of the same structure, whose tensors are on another device."""
    before = predict(body)
    replicas = {module: module._replicate_for_data_parallel() for module in body.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, None if tensor is None else tensor * 1.1)
    found = features(replicas[body])
    assert torch.equal(predict(body), before)
    body.load_state_dict({key: value * 1.1 for key, value in body.state_dict().items()})
    assert_same(found, unfolded(body))


def test_threads_predict_with_models_that_change(body):
    other = copy.deepcopy(body)
    models = [body, body, other]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            with torch.no_grad():
                copy_data(body)
                lerp_all(other)
            for model, found in zip(models, pool.map(predict, models), strict=True):
                assert_same(found, unfolded(model))


def test_fake_and_meta_tensors_leave_nothing_behind(body):
    before = predict(body)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert features(body, torch.empty(1, 3, 64, 96)).shape == before.shape
    meta = copy.deepcopy(body).to("meta")
    assert features(meta, IMAGE.to("meta")).shape == before.shape
    assert torch.equal(predict(body), before)


def test_transforms_of_torch_func(body):
    """Forward and reverse derivatives, and a batch of models, agree with finite differences and with single calls."""
    body.double().requires_grad_(False).eval()
    image, direction = IMAGE.double(), torch.ones_like(IMAGE).double()
    numeric = (features(body, image + 1e-6 * direction) - features(body, image - 1e-6 * direction)) / 2e-6
    with torch.no_grad():
        assert_same(torch.func.jvp(partial(features, body), (image,), (direction,))[1], numeric, 1e-5)
        body.float()
        assert_same(torch.func.jvp(partial(features, body), (IMAGE,), (direction.float(),))[1].double(), numeric, 1e-2)
    gradient = torch.func.grad(lambda x: features(body, x).sum())(IMAGE)
    assert (gradient * direction).sum().item() == pytest.approx(numeric.sum().item(), rel=1e-2)

    states = {key: torch.stack([value, value * 1.1]) for key, value in body.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # of operators without a rule for batches
        both = torch.func.vmap(lambda state: torch.func.functional_call(body, state, (IMAGE,))["layer4"])(states)
        for i in range(2):
            state = {key: value[i] for key, value in states.items()}
            assert_same(both[i], torch.func.functional_call(body, state, (IMAGE,))["layer4"])


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
        assert torch.equal(features(body), before)
    image = IMAGE.clone().requires_grad_()
    features(body.requires_grad_(False), image).sum().backward()
    assert image.grad.any()
    take_step(body.requires_grad_(True).train())


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        body = random_norms(Backbone("resnet18")).eval().body
        before = features(body)
        body.conv1.weight.mul_(2)
        assert not torch.equal(features(body), before)
