"""Augmentation of an image together with its target (DETR, section 4; sizes as in the published recipe).

Images are uint8 tensors [3, H, W], fastest with the channels last in memory, as they are decoded. Targets hold `boxes`
[N, 4] as absolute xyxy until `normalize_boxes` makes them relative cxcywh, and may hold `masks` [N, H, W], uint8 with 0
and 1. A transform is called with (image, target, rng) and draws only from `rng`, so that samples can be reproduced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from util.box_ops import box_xyxy_to_cxcywh

Target = dict[str, Tensor]
Transform = Callable[[Tensor, Target, random.Random], tuple[Tensor, Target]]

# In the published code, the resize before the crop has no limit: a strip of 10 × 20,000 pixels would grow to
# 400 × 800,000. Here, the limit is this multiple of `max_size`, which photos and panoramas up to 22:1 do not reach.
ZOOM_LIMIT = 10

PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks")


def keep_objects(target: Target, keep: Tensor) -> Target:
    """Return the target with the objects for which the mask `keep` [N] is True."""
    return target | {name: target[name][keep] for name in PER_OBJECT if name in target}


def crop(image: Tensor, target: Target, region: tuple[int, int, int, int]) -> tuple[Tensor, Target]:
    """Cut out (top, left, height, width); drop objects outside of it, and set areas to the areas of the boxes."""
    top, left, height, width = region
    target = target | {"size": torch.tensor([height, width])}
    if "boxes" in target:
        boxes = target["boxes"] - torch.tensor([left, top, left, top], dtype=torch.float32)
        boxes = boxes.view(-1, 2, 2).minimum(torch.tensor([width, height], dtype=torch.float32)).clamp(min=0)
        extent = boxes[:, 1] - boxes[:, 0]
        target |= {"boxes": boxes.flatten(1), "area": extent.prod(1)}
        if "masks" in target:
            target["masks"] = F.crop(target["masks"], top, left, height, width)
        target = keep_objects(target, (extent > 0).all(1))
    return F.crop(image, top, left, height, width), target


def hflip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flip left and right."""
    if "boxes" in target:
        width = image.shape[2]
        x1, y1, x2, y2 = target["boxes"].unbind(-1)
        target = target | {"boxes": torch.stack([width - x2, y1, width - x1, y2], dim=-1)}
    if "masks" in target:
        target = target | {"masks": F.horizontal_flip(target["masks"])}
    return F.horizontal_flip(image), target


def resized_size(width: int, height: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """Return (width, height) with a short side of `size`, or less if the long side would exceed `max_size`.

    Round as the published code does: the limited short side to the nearest integer, the long side down. If the short
    side would be 0, it is one pixel, and the long side `max_size`.
    """
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size == 0:
            return (1, max_size) if width < height else (max_size, 1)
    if short == size:
        return width, height
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)


def scale_target(target: Target, old: tuple[int, int], new: tuple[int, int]) -> Target:
    """Return the target of an image whose (width, height) changes from `old` to `new`."""
    (width, height), (ratio_w, ratio_h) = new, (new[0] / old[0], new[1] / old[1])
    target = target | {"size": torch.tensor([height, width])}
    if "boxes" in target:
        scale = torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h], dtype=torch.float32)
        target |= {"boxes": target["boxes"] * scale, "area": target["area"] * (ratio_w * ratio_h)}
    if "masks" in target:
        target |= {"masks": scale_masks(target["masks"], height, width)}
    return target


def scale_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Return masks [N, H, W] at another size, [N, height, width]; each pixel takes the nearest one's value."""
    rows, columns = (
        (torch.arange(new) * (old / new)).long() for new, old in zip((height, width), masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]


def resize(
    image: Tensor, target: Target, size: int | tuple[int, int], max_size: int | None = None
) -> tuple[Tensor, Target]:
    """Scale the short side to `size`, the long side to at most `max_size`; or scale to `size` = (width, height)."""
    old_height, old_width = image.shape[1:]
    width, height = size if isinstance(size, list | tuple) else resized_size(old_width, old_height, size, max_size)
    target = scale_target(target, (old_width, old_height), (width, height))
    image = image[None].contiguous(memory_format=torch.channels_last)[0]  # crops are not contiguous; twice as fast
    return F.resize(image, [height, width]), target


def normalize_boxes(target: Target, width: int, height: int) -> Target:
    """Convert absolute xyxy boxes to cxcywh relative to the image."""
    if "boxes" not in target:
        return target
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    return target | {"boxes": box_xyxy_to_cxcywh(target["boxes"]) / size}


class Compose:
    """Transforms that are applied one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: Tensor, target: Target, rng: random.Random) -> tuple[Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


class RandomHorizontalFlip:
    """Horizontal flip with probability 1/2."""

    def __call__(self, image: Tensor, target: Target, rng: random.Random) -> tuple[Tensor, Target]:
        return hflip(image, target) if rng.random() < 0.5 else (image, target)


class RandomResize:
    """Resize of the short side to one of `sizes`, chosen at random."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        self.sizes = sizes
        self.max_size = max_size

    def __call__(self, image: Tensor, target: Target, rng: random.Random) -> tuple[Tensor, Target]:
        return resize(image, target, rng.choice(self.sizes), self.max_size)


class RandomSizeCrop:
    """Random crop: width and height are drawn independently from `min_size` to `max_size`, at most the image's side."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(self, image: Tensor, target: Target, rng: random.Random) -> tuple[Tensor, Target]:
        old_height, old_width = image.shape[1:]
        width, height = (rng.randint(min(self.min_size, n), min(self.max_size, n)) for n in (old_width, old_height))
        left, top = rng.randint(0, old_width - width), rng.randint(0, old_height - height)
        return crop(image, target, (top, left, height, width))


class RandomChoice:
    """Choice of one of several transforms with equal probability."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms

    def __call__(self, image: Tensor, target: Target, rng: random.Random) -> tuple[Tensor, Target]:
        return rng.choice(self.transforms)(image, target, rng)


def make_coco_transforms(image_set: str, min_size: int = 800, max_size: int = 1333) -> Transform:
    """Return the published augmentation for "train", and only the resize for any other split.

    All sizes of the recipe are scaled by `min_size` / 800 and rounded, so that 800 gives the published sizes.
    """
    if image_set != "train":
        return RandomResize([min_size], max_size)

    def scaled(*sizes: int) -> list[int]:
        return [max(round(size * min_size / 800), 1) for size in sizes]

    multi_scale = RandomResize(scaled(*range(480, 801, 32)), max_size)
    enlarge = RandomResize(scaled(400, 500, 600), ZOOM_LIMIT * max_size)
    zoom = Compose([enlarge, RandomSizeCrop(*scaled(384, 600)), multi_scale])
    return Compose([RandomHorizontalFlip(), RandomChoice(multi_scale, zoom)])
