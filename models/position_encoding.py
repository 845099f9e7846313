"""Position encodings: sine embeddings of points, and position embeddings of feature maps.

Shapes: B images, feature map H×W, C model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from util.errors import InputError

TEMPERATURE = 10_000


def sine_embedding(coordinate: Tensor, num_features: int) -> Tensor:
    """Map coordinates [...] in [0, 1] to [..., F]: sines and cosines of F / 2 frequencies, interleaved (DETR, A.4).

    The wavelengths grow geometrically from 1 (2π over the unit interval) towards `TEMPERATURE`.
    """
    exponent = torch.arange(0, num_features, 2, dtype=torch.float32, device=coordinate.device) / num_features
    angle = coordinate[..., None] * (2 * math.pi) / TEMPERATURE**exponent  # [..., F / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def point_embedding(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return the embedding p_s [..., C] of points in [0, 1]², x and y [...], with the C / 2 features of y first."""
    return torch.cat((sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)), dim=-1)


class PositionEmbeddingSine(nn.Module):
    """Position embedding of each cell of a feature map by its position within the unpadded image."""

    EPS = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, padding: Tensor) -> Tensor:
        """Map a padding mask [B, H, W] (True: padding) to positions [B, H, W, C]."""
        inside = ~padding
        row = inside.cumsum(1, dtype=torch.float32)  # 1, 2, .. inside the image
        column = inside.cumsum(2, dtype=torch.float32)
        y = row / (row[:, -1:, :] + self.EPS)
        x = column / (column[:, :, -1:] + self.EPS)
        return point_embedding(x, y, self.dim)


class PositionEmbeddingLearned(nn.Module):
    """Position embedding with a learned vector for every row and every column of the feature map."""

    SIZE = 50  # rows and columns, as in the published tables

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.SIZE, dim // 2)
        self.col_embed = nn.Embedding(self.SIZE, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, padding: Tensor) -> Tensor:
        """Map a padding mask [B, H, W] to positions [B, H, W, C], with the C / 2 features of x first.

        Raise InputError for a feature map with more rows or columns than the tables have.
        """
        batch, height, width = padding.shape
        if max(height, width) > self.SIZE:
            raise InputError(
                f"--position_embedding learned has {self.SIZE} rows and columns, a feature map is {height}×{width}: "
                "use smaller images (--min_size, --max_size), no --dilation, or --position_embedding sine"
            )
        x = self.col_embed.weight[:width].expand(height, -1, -1)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat((x, y), dim=-1).expand(batch, -1, -1, -1)


def build_position_embedding(kind: str, dim: int) -> nn.Module:
    """Return the module that `--position_embedding` names, "sine" or "learned"."""
    classes = {"sine": PositionEmbeddingSine, "learned": PositionEmbeddingLearned}
    if kind not in classes:
        raise InputError(f"--position_embedding {kind}: choose one of {', '.join(classes)}")
    return classes[kind](dim)
