"""Batches of images of different sizes.

Shapes: B images, padded to the common height H and width W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NestedTensor:
    """Images padded to one size: `tensors` [B, 3, H, W] and `mask` [B, H, W], True on padding."""

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        return NestedTensor(
            self.tensors.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> NestedTensor:
        """Called by the data loader when it pins batches for the copy to the GPU."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor({list(self.tensors.shape)}, {self.tensors.dtype})"


def nested_tensor_from_tensor_list(images: Sequence[Tensor]) -> NestedTensor:
    """Pads [3, h, w] images with zeros at the right and bottom to the largest height and width among them."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    tensors = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=tensors.device)
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        tensors[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return NestedTensor(tensors, mask)


def collate_fn(batch: Sequence[tuple[Tensor, dict]]) -> tuple[NestedTensor, tuple[dict, ...]]:
    """(image, target) pairs to (padded images, targets)."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images), targets
