"""Weights, images and targets of the figures in tests/data, which depend only on names, shapes and seeds."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load_figures(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Return the scalars and the arrays that were recorded under a name."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return json.loads((DATA / f"{name}.json").read_text()), {key: torch.from_numpy(arrays[key]) for key in arrays}


def reference_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference value of every tensor of a state dict."""
    return {key: reference_tensor(key, tuple(value.shape)) for key, value in state_dict.items()}


def reference_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a value in the range of a trained tensor of this name, drawn with the key's checksum as seed."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    vector = len(shape) == 1
    if key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = rng.standard_normal(shape) * 0.1
    elif vector and key.endswith("weight"):  # norms; the last one of a residual block is small
        value = rng.uniform(0.8, 1.2, shape) * (0.25 if ".bn3." in key else 1)
    elif key.endswith("class_embed.bias"):
        value = rng.standard_normal(shape) * 0.5 - 4.6
    elif vector:
        value = rng.standard_normal(shape) * 0.05
    elif key.endswith("query_embed.weight"):
        value = rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]))
    return torch.tensor(value, dtype=torch.float32)


def reference_images(sizes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Return an image [3, height, width] of waves and noise for every (height, width)."""
    images = []
    for i, (height, width) in enumerate(sizes):
        rng = np.random.RandomState(1000 * seed + i)
        rows = np.linspace(0, 2 * np.pi, height).reshape(1, -1, 1)
        columns = np.linspace(0, 2 * np.pi, width).reshape(1, 1, -1)
        phase = rng.uniform(0, 2 * np.pi, (3, 1, 1))
        frequency = rng.uniform(0.5, 3, (3, 2, 1, 1))
        waves = np.sin(frequency[:, 0] * rows + phase) + np.cos(frequency[:, 1] * columns - phase)
        images.append(torch.tensor(waves + 0.3 * rng.standard_normal((3, height, width)), dtype=torch.float32))
    return images


def reference_targets(num_boxes: list[int], seed: int, num_classes: int = 91) -> list[dict[str, Tensor]]:
    """Return targets with the given numbers of boxes, whose sides are 0.05 to 0.5, and labels below `num_classes`."""
    targets = []
    for i, n in enumerate(num_boxes):
        rng = np.random.RandomState(7000 + 1000 * seed + i)
        sides = rng.uniform(0.05, 0.5, (n, 2))
        centres = sides / 2 + rng.uniform(0, 1, (n, 2)) * (1 - sides)
        boxes = torch.tensor(np.hstack([centres, sides]), dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.tensor(rng.randint(1, num_classes, n), dtype=torch.int64)})
    return targets


def sharpened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rescale reference weights so that attention is selective and the queries of a decoder differ."""
    sharp = {}
    for key, value in weights.items():
        in_decoder, cross = ".decoder." in key, "cross_attn" in key or "multihead_attn" in key
        if re.search(r"(\.(sa|ca)_[qk]pos\w*_proj|bbox_attention\.[qk]_linear)\.weight$", key):
            value = value * 8
        elif key.endswith("attn.out_proj.weight"):
            value = value * (2 if in_decoder and cross else 0.3)
        elif key.endswith("in_proj_weight"):
            queries_and_keys, values = value.split([2 * len(value) // 3, len(value) // 3])
            value = torch.cat([queries_and_keys * (8 if in_decoder else 4), values])
        elif key.endswith("mask_head.lay1.weight"):
            features, maps = value.split([value.shape[1] - 8, 8], dim=1)
            value = torch.cat([features, maps * 100], dim=1)
        elif re.search(r"mask_head\.adapter\d\.weight$", key):
            value = value * 0.05
        sharp[key] = value
    return sharp
