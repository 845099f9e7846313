"""Models in other programs: wrong inputs raise errors of one line; copies and empty models work."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from main import get_args_parser
from models import build_model
from models.detector import IMAGENET_MEAN, IMAGENET_STD
from models.postprocess import PostProcess
from tests.small import FLAGS, build_small
from util.misc import NestedTensor, nested_tensor_from_tensor_list

RGB = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 64, 96, dtype=torch.bool)


@pytest.fixture(scope="module")
def model():
    return build_small("--no_aux_loss")[0]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (RGB, r"a single image \[3, 64, 96\]: pass it in a list, model\(\[image\]\)"),
        (RGB[0], r"a tensor \[64, 96\]: pass a list"),
        (RGB[None, None], r"a tensor \[1, 1, 3, 64, 96\]: pass a list"),
        (torch.zeros(4, 64, 96)[None], r"the images \[1, 4, 64, 96\]: 4 channels instead of 3; RGBA: drop the last"),
        ([RGB, torch.zeros(4, 64, 96)], r"image 1 \[4, 64, 96\]: 4 channels instead of 3; RGBA: drop the last"),
        ([RGB[:1]], r"image 0 \[1, 64, 96\]: 1 channels instead of 3; grey: repeat it"),
        ([RGB.permute(1, 2, 0)], r"image 0 \[64, 96, 3\]: 64 channels instead of 3; .* image.permute\(2, 0, 1\)"),
        ([RGB[None]], r"image 0 is a tensor \[1, 3, 64, 96\]: pass a list"),
        ([RGB[:, :0]], r"image 0 \[3, 0, 96\]: no pixels"),
        (RGB[None, :, :, :0], r"the images \[1, 3, 64, 0\]: no pixels"),
        (RGB[None][:0], r"no images, a tensor \[0, 3, 64, 96\]"),
        ([], "an empty list: pass a list"),
        ((), "an empty list: pass a list"),
        ([RGB, RGB.float()], r"images of more than one dtype \(torch.uint8, torch.float32\): convert them to one"),
        ([RGB, RGB.to("meta")], r"images of more than one device \(cpu, meta\): convert them to one"),
        ([RGB.int()], r"image 0: torch.int32 values; pass uint8 \(0 to 255\), or floats normalised"),
        (RGB[None].bool(), r"the images: torch.bool values; pass uint8"),
        (RGB[None].to(torch.complex64), r"the images: torch.complex64 values; pass uint8"),
        (RGB.numpy(), r"numpy.ndarray \(convert it by torch.from_numpy, channels first\): pass a list"),
        ([RGB.numpy()], r"image 0 is numpy.ndarray \(convert it by torch.from_numpy, channels first\): pass a list"),
        ([Image.new("RGB", (4, 4))], r"image 0 is PIL.Image.Image \(convert it by torchvision.*pil_to_tensor\): pass"),
        ("photo.jpg", "^str: pass a list"),
        (None, "^NoneType: pass a list"),
        ({"image": RGB}, "^dict: pass a list"),
        (NestedTensor(RGB[None], None), "a NestedTensor with NoneType as mask: it must be a bool tensor"),
        (NestedTensor(RGB[None], MASK[0]), r"a mask torch.bool \[64, 96\]: it must be a bool tensor \[1, 64, 96\]"),
        (NestedTensor(RGB[None], MASK[:, 1:]), r"a mask torch.bool \[1, 63, 96\]: it must be .* \[1, 64, 96\]"),
        (NestedTensor(RGB[None], MASK.float()), r"a mask torch.float32 \[1, 64, 96\]: it must be a bool tensor"),
        (NestedTensor(RGB, MASK), r"a NestedTensor of images \[3, 64, 96\]: they must be \[B, 3, H, W\]"),
        (NestedTensor([RGB], MASK), "a NestedTensor of list: pass a list"),
    ],
)
def test_wrong_samples_raise_an_error_of_one_line(model, samples, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        model(samples)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 96), r"target_sizes is tuple: pass a tensor \[1, 2\]"),
        ([(64, 96)], r"target_sizes is list: pass a tensor \[1, 2\]"),
        (np.array([[64, 96]]), r"target_sizes is numpy.ndarray .*: pass a tensor \[1, 2\]"),
        (torch.tensor([64, 96]), r"target_sizes \[2\]: pass a tensor \[1, 2\]"),
        (torch.tensor([[64, 96]] * 2), r"target_sizes \[2, 2\]: pass a tensor \[1, 2\]"),
        (torch.tensor([[3, 64, 96]]), r"target_sizes \[1, 3\]: pass a tensor \[1, 2\]"),
        (torch.tensor([[True, True]]), r"target_sizes: torch.bool values; pass"),
    ],
)
@torch.no_grad()
def test_wrong_target_sizes_are_named(model, sizes, message):
    outputs = model([RGB])
    with pytest.raises((TypeError, ValueError), match=message):
        PostProcess()(outputs, sizes)


@torch.no_grad()
def test_the_nested_tensor_of_other_code_is_accepted(model):
    batch = nested_tensor_from_tensor_list([RGB, RGB[:, :32]])
    expected = model(batch)["pred_logits"]
    assert torch.equal(model(SimpleNamespace(decompose=batch.decompose))["pred_logits"], expected)


@torch.no_grad()
def test_images_are_not_changed(model):
    for batch in (RGB[None].clone(), RGB[None] / 255):
        before = batch.clone()
        model(batch)
        assert torch.equal(batch, before)


@torch.no_grad()
def test_vmap_computes_the_same_as_a_batch(model):
    images = torch.stack([RGB, RGB.flip(2)]).float() / 255
    found = torch.func.vmap(lambda image: model(image[None])["pred_logits"][0])(images)
    torch.testing.assert_close(found, model(images)["pred_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_a_model_without_memory_loads_its_whole_state(model, assign):
    """Tensors that the state dict lacks are computed again; none keeps the undefined values of `to_empty`."""
    with torch.device("meta"):
        empty, _, _ = build_model(get_args_parser().parse_args([*map(str, FLAGS), "--no_aux_loss"]))
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert {name for name, _ in empty.named_buffers()} <= empty.state_dict().keys()
    assert torch.equal(empty.eval()([RGB])["pred_logits"], model([RGB])["pred_logits"])


@torch.no_grad()
def test_mean_and_deviation_of_pixels_follow_the_dtype_of_the_model(model):
    for values, found in ((IMAGENET_MEAN, model.pixel_mean), (IMAGENET_STD, model.pixel_std)):
        assert torch.equal(found, torch.tensor(values).view(3, 1, 1))
    assert copy.deepcopy(model).double().pixel_mean.dtype is torch.float64


@torch.no_grad()
def test_copies_compute_the_same(model):
    expected = model([RGB])["pred_logits"]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin([RGB])["pred_logits"], expected)
        assert list(twin.state_dict()) == list(model.state_dict())
