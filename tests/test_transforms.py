"""Transforms give the published sizes and targets, and are reproducible."""

import json
import random

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets import transforms as T
from datasets.records import Objects
from datasets.targets import make_target
from models.detector import IMAGENET_MEAN, IMAGENET_STD, Detector
from tests.reference import DATA

FIGURES = json.loads((DATA / "transforms.json").read_text())
LABELS = {label: label for label in range(100)}  # by category id
INTEGERS = ("labels", "image_id", "iscrowd", "orig_size", "size")


def as_target(plain: dict) -> T.Target:
    target = {key: torch.tensor(value, dtype=torch.int64 if key in INTEGERS else None) for key, value in plain.items()}
    return target | {"boxes": target["boxes"].float().view(-1, 4)}


def blank(width: int, height: int) -> torch.Tensor:
    return torch.zeros(3, height, width, dtype=torch.uint8)


def assert_same(target: T.Target, plain: dict) -> None:
    expected = as_target(plain)
    assert target.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(target[key], value.to(target[key].dtype), atol=1e-4, rtol=1e-6)


def whole_image(width: int, height: int) -> T.Target:
    """Return the target of an image that one object fills."""
    object_ = {"bbox": [0, 0, width, height], "category_id": 1, "area": 1.0, "iscrowd": 0}
    return make_target(1, Objects.from_annotations([object_], LABELS), width, height)


def texture(width: int, height: int) -> torch.Tensor:
    """Return an image of edges and noise at several scales, over the whole range of values."""
    fine, coarse = (Image.effect_noise((side, side), 90).convert("RGB") for side in (128, 8))
    mixed = Image.composite(fine, coarse.resize((128, 128), 0), Image.linear_gradient("L").resize((128, 128)))
    return pil_to_tensor(mixed.resize((width, height), 0))


@pytest.mark.parametrize("case", FIGURES["resize_sizes"])
def test_sizes_are_the_published_ones(case):
    size = T.resized_size(case["width"], case["height"], case["size"], case["max_size"])
    assert size == (case["out_width"], case["out_height"])


@pytest.mark.parametrize("case", FIGURES["prepare"])
def test_targets_are_the_published_ones(case):
    objects = Objects.from_annotations(({"iscrowd": 0} | entry for entry in case["annotations"]), LABELS)
    assert_same(make_target(case["image_id"], objects, case["width"], case["height"]), case["target"])


@pytest.mark.parametrize("case", FIGURES["resize"])
def test_resized_targets_are_the_published_ones(case):
    image = blank(case["width"], case["height"])
    image, target = T.resize(image, as_target(case["in"]), case["size"], case["max_size"])
    assert image.shape == (3, case["out_height"], case["out_width"])
    assert_same(target, case["target"])


@pytest.mark.parametrize("new", [(1066, 800), (640, 480), (333, 250), (100, 1333), (61, 7), (1, 1)])
@pytest.mark.parametrize("old", [(640, 480), (427, 640), (2000, 37)])
def test_resized_pixels_are_those_of_pil(old, new):
    """At least 99.9 % of them differ by at most one grey level. Memory layouts and crops make no difference."""
    image = texture(*old)
    reference = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(new, Image.Resampling.BILINEAR)
    resized, _ = T.resize(image, {}, new)
    difference = (resized.int() - pil_to_tensor(reference).int()).abs()
    assert (difference <= 1).float().mean() >= 0.999
    assert torch.equal(T.resize(image.contiguous(), {}, new)[0], resized)
    frame = torch.zeros(3, old[1] + 2, old[0] + 5, dtype=torch.uint8)
    frame[:, 1:-1, 2:-3] = image
    region, _ = T.crop(frame, {}, (1, 2, old[1], old[0]))
    assert torch.equal(T.resize(region, {}, new)[0], resized)


@pytest.mark.parametrize("case", FIGURES["crop"])
def test_cropped_targets_are_the_published_ones(case):
    region = case["region_top_left_height_width"]
    image, target = T.crop(blank(640, 480), as_target(case["in"]), tuple(region))
    assert image.shape[1:] == tuple(region[2:])
    assert_same(target, case["target"])


@pytest.mark.parametrize("case", FIGURES["hflip"])
def test_flipped_targets_are_the_published_ones(case):
    _, target = T.hflip(blank(case["width"], case["height"]), as_target(case["in"]))
    assert_same(target, case["target"])


@pytest.mark.parametrize("case", FIGURES["normalize"])
def test_normalised_targets_and_images_are_the_published_ones(case):
    """The transform makes boxes relative; the model normalises pixels."""
    image = torch.tensor(case["image_uint8_hwc"], dtype=torch.uint8).permute(2, 0, 1)
    target = T.normalize_boxes(as_target(case["in"]), width=image.shape[2], height=image.shape[1])
    assert_same(target, case["target"])
    model = torch.nn.Module()
    model.pixel_mean, model.pixel_std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    padding = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    normalised = Detector.normalize(model, image[None], padding)[0]
    assert_close(normalised, torch.tensor(case["tensor_chw"]), atol=1e-6, rtol=0)


def test_the_recipe_has_the_published_sizes():
    transform = T.make_coco_transforms("train")
    multi_scale, zoom = transform.transforms[1].transforms
    assert multi_scale.sizes == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert multi_scale.max_size == 1333
    before, crop, after = zoom.transforms
    assert (before.sizes, before.max_size) == ([400, 500, 600], 13330)
    assert (crop.min_size, crop.max_size) == (384, 600)
    assert after is multi_scale
    plain = T.make_coco_transforms("val")
    assert (plain.sizes, plain.max_size) == ([800], 1333)


def test_the_recipe_scales_with_min_size():
    multi_scale, zoom = T.make_coco_transforms("train", 100, 167).transforms[1].transforms
    assert multi_scale.sizes == [60, 64, 68, 72, 76, 80, 84, 88, 92, 96, 100]
    assert zoom.transforms[0].sizes == [50, 62, 75]
    assert (zoom.transforms[1].min_size, zoom.transforms[1].max_size) == (48, 75)


@pytest.mark.parametrize("size", [(640, 480), (50, 700), (1, 1)])
def test_augmentation_depends_only_on_its_generator(size):
    transform = T.make_coco_transforms("train", 200, 333)
    target = whole_image(*size)
    image = texture(*size)
    seen = set()
    for seed in range(12):
        first, boxes = transform(image, target, random.Random(seed))
        random.random()
        second, _ = transform(image, target, random.Random(seed))
        assert torch.equal(first, second)
        assert (boxes["boxes"] >= 0).all()
        assert first.shape[1:] == tuple(boxes["size"].tolist())
        seen.add(first.numpy().tobytes())
    assert len(seen) > 1 or size == (1, 1)
