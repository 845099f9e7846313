"""Checks of a model's inputs, with a one-line error for invalid ones.

Shapes: B images, padded to the common height H and width W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

EXPECTED = "pass a list of RGB images [3, height, width], one tensor [B, 3, H, W], or a NestedTensor"


def as_batch(samples: Any) -> NestedTensor:
    """Return the padded batch of a NestedTensor, a list of [3, h, w] images, or one [B, 3, H, W] tensor.

    Raises:
        TypeError: for anything other than tensors.
        ValueError: for tensors of other shapes or types, or tensors that do not match each other.
    """
    if hasattr(samples, "decompose"):  # also the NestedTensor of another copy of this code
        return check_nested(samples)
    if isinstance(samples, Tensor):
        if samples.dim() == 3:
            raise ValueError(f"a single image {shape_of(samples)}: pass it in a list, model([image])")
        if samples.dim() != 4:
            raise ValueError(f"a tensor {shape_of(samples)}: {EXPECTED}")
        check_image(samples, "the images")
        if samples.shape[0] == 0:
            raise ValueError(f"no images, a tensor {shape_of(samples)}: {EXPECTED}")
        mask = torch.zeros(samples[:, 0].shape, dtype=torch.bool, device=samples.device)
        return NestedTensor(samples, mask, has_padding=False)
    if not isinstance(samples, (list, tuple)):
        raise TypeError(f"{kind_of(samples)}: {EXPECTED}")
    if not samples:
        raise ValueError(f"an empty list: {EXPECTED}")
    for i, image in enumerate(samples):
        if not isinstance(image, Tensor):
            raise TypeError(f"image {i} is {kind_of(image)}: {EXPECTED}")
        if image.dim() != 3:
            raise ValueError(f"image {i} is a tensor {shape_of(image)}: {EXPECTED}")
        check_image(image, f"image {i}")
    for what in ("dtype", "device"):
        found = list(dict.fromkeys(str(getattr(image, what)) for image in samples))
        if len(found) > 1:
            raise ValueError(f"images of more than one {what} ({', '.join(found)}): convert them to one")
    return nested_tensor_from_tensor_list(samples)


def check_image(image: Tensor, name: str) -> None:
    """Raise ValueError unless a tensor [.., 3, h, w] holds RGB values that a model accepts."""
    *_, channels, height, width = image.shape
    if channels != 3:
        known = {1: "grey: repeat it by image.expand(3, -1, -1)", 4: "RGBA: drop the last by image[:3]"}
        last = ", or are they last? Then move them by image.permute(2, 0, 1)" if width == 3 else ""
        advice = known.get(channels, EXPECTED) if not last else "3 are needed" + last
        raise ValueError(f"{name} {shape_of(image)}: {channels} channels instead of 3; {advice}")
    if height == 0 or width == 0:
        raise ValueError(f"{name} {shape_of(image)}: no pixels")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(
            f"{name}: {image.dtype} values; pass uint8 (0 to 255), or floats normalised by ImageNet's mean and std"
        )


def check_nested(samples: Any) -> NestedTensor:
    """Return a NestedTensor whose mask fits its images; raise ValueError or TypeError otherwise."""
    images, mask = samples.decompose()
    if not isinstance(images, Tensor):
        raise TypeError(f"a NestedTensor of {kind_of(images)}: {EXPECTED}")
    if images.dim() != 4:
        raise ValueError(f"a NestedTensor of images {shape_of(images)}: they must be [B, 3, H, W]")
    check_image(images, "the images")
    expected = [images.shape[0], *images.shape[2:]]
    if not isinstance(mask, Tensor):
        raise TypeError(f"a NestedTensor with {kind_of(mask)} as mask: it must be a bool tensor {expected}")
    if list(mask.shape) != expected or mask.dtype != torch.bool:
        raise ValueError(f"a mask {mask.dtype} {shape_of(mask)}: it must be a bool tensor {expected}, True on padding")
    return samples if isinstance(samples, NestedTensor) else NestedTensor(images, mask)


def check_target_sizes(sizes: Any, num_images: int) -> None:
    """Raise TypeError or ValueError unless sizes are a tensor [num_images, 2] of (height, width)."""
    expected = f"pass a tensor [{num_images}, 2], the (height, width) of each image in pixels"
    if not isinstance(sizes, Tensor):
        raise TypeError(f"target_sizes is {kind_of(sizes)}: {expected}")
    if sizes.dim() != 2 or sizes.shape[0] != num_images or sizes.shape[1] != 2:
        raise ValueError(f"target_sizes {shape_of(sizes)}: {expected}")
    if sizes.dtype == torch.bool or sizes.is_complex():
        raise ValueError(f"target_sizes: {sizes.dtype} values; {expected}")


def shape_of(tensor: Tensor) -> str:
    """Return the shape of a tensor as text, such as [3, 480, 640]."""
    return str(list(tensor.shape))


def kind_of(value: Any) -> str:
    """Describe the type of a value, with advice if it can be converted."""
    advice = {
        "numpy": " (convert it by torch.from_numpy, channels first)",
        "PIL": " (convert it by torchvision.transforms.v2.functional.pil_to_tensor)",
    }
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.") + advice.get(
        kind.__module__.split(".")[0], ""
    )
