"""Batches of images of different sizes.

Shapes: B images, padded to the common height H and width W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class NestedTensor:
    """Images padded to one size: `tensors` [B, 3, H, W] and `mask` [B, H, W], True on padding.

    `has_padding` is False if the mask is False everywhere; attention is then faster. To read this from a
    mask on a GPU, the host would have to wait.
    """

    def __init__(self, tensors: Tensor, mask: Tensor, has_padding: bool = True) -> None:
        self.tensors = tensors
        self.mask = mask
        self.has_padding = has_padding

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        """Return the batch on a device, with the channels first in memory (see `collate_fn`)."""
        tensors, mask = (t.to(device, non_blocking=non_blocking) for t in self.decompose())
        return NestedTensor(tensors.contiguous(), mask, self.has_padding)

    def pin_memory(self) -> NestedTensor:
        """Pin the batch for the copy to the GPU; the data loader calls this."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), self.has_padding)

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor({list(self.tensors.shape)}, {self.tensors.dtype})"


def nested_tensor_from_tensor_list(
    images: Sequence[Tensor], memory_format: torch.memory_format = torch.contiguous_format
) -> NestedTensor:
    """Pad [3, h, w] images with zeros at the right and bottom to the largest height and width among them."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    dtype, device = images[0].dtype, images[0].device
    shape = len(images), images[0].shape[0], height, width
    tensors = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=device)
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        tensors[i, :, :h, :w] = image
        tensors[i, :, h:] = 0
        tensors[i, :, :, w:] = 0
        mask[i, h:] = True
        mask[i, :, w:] = True
    return NestedTensor(tensors, mask, has_padding=any(image.shape[1:] != (height, width) for image in images))


class Targets(tuple):
    """Targets of a batch: dicts of small tensors, which workers send to the main process as NumPy arrays.

    Sent as tensors, each would need a file of shared memory, and a mapping of it in both processes.
    """

    def __reduce__(self) -> tuple:
        return _targets_of_arrays, ([{key: value.numpy() for key, value in target.items()} for target in self],)


def _targets_of_arrays(targets: list[dict[str, np.ndarray]]) -> Targets:
    return Targets({key: torch.from_numpy(value) for key, value in target.items()} for target in targets)


def collate_fn(batch: Sequence[tuple[Tensor, dict]]) -> tuple[NestedTensor, Targets]:
    """Convert (image, target) pairs to (padded images, targets).

    The channels stay last in memory, as in decoded images: moving them takes a worker as long as the resize, but takes
    the device almost no time.
    """
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images, torch.channels_last), Targets(targets)
