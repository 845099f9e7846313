"""Position encodings: sine embeddings of points, and position embeddings of feature maps.

Shapes: B images, feature map H×W, C model width, F = C / 2 features per coordinate.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from models.not_scriptable import NotScriptable
from util.errors import InputError
from util.nested_tensor import NestedTensor

TEMPERATURE = 10_000


def sine_embedding(angle: Tensor, num_features: int, temperature: float = TEMPERATURE) -> Tensor:
    """Map angles [...] to [..., F]: sines and cosines of F / 2 frequencies, interleaved (DETR, A.4).

    The wavelengths grow geometrically from 2π towards 2π · `temperature`.
    """
    exponent = torch.arange(0, num_features, 2, dtype=torch.float32, device=angle.device) / num_features
    angle = angle[..., None] / temperature**exponent  # [..., F / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def point_embedding(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return the embedding p_s [..., C] of points in [0, 1]², x and y [...], with the features of y first."""
    return sine_embedding(torch.stack((y, x), dim=-1) * (2 * math.pi), dim // 2).flatten(-2)


class PositionEmbeddingSine(NotScriptable, nn.Module):
    """Position embedding of each cell of a feature map by its row and column within the unpadded image.

    Args:
        num_pos_feats: F.
        temperature: of `sine_embedding`.
        normalize: divide rows and columns by their number in the unpadded image, and multiply by `scale`.
        scale: 2π by default; needs `normalize`.

    Raises:
        ValueError: if `scale` is given without `normalize`.
    """

    EPS = 1e-6

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = TEMPERATURE,
        normalize: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale={scale} has no effect: pass normalize=True with it")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Return positions [B, C, H, W], the F features of rows first, for a feature map with its mask."""
        inside = ~tensor_list.mask
        y = inside.cumsum(1, dtype=torch.float32)  # 1, 2, .. inside the image
        x = inside.cumsum(2, dtype=torch.float32)
        if self.normalize:
            y = y / (y[:, -1:, :] + self.EPS) * self.scale
            x = x / (x[:, :, -1:] + self.EPS) * self.scale
        features = sine_embedding(torch.stack((y, x), dim=-1), self.num_pos_feats, self.temperature)  # [B, H, W, 2, F]
        return features.flatten(-2).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(NotScriptable, nn.Module):
    """Position embedding with a learned vector for every row and every column of the feature map.

    Args:
        num_pos_feats: F, the width of these vectors.
    """

    SIZE = 50  # rows and columns, as in the published tables

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.SIZE, num_pos_feats)
        self.col_embed = nn.Embedding(self.SIZE, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Return positions [B, C, H, W], the F features of columns first, for a feature map.

        Raise InputError for a feature map with more rows or columns than the tables have.
        """
        batch, height, width = tensor_list.mask.shape
        if max(height, width) > self.SIZE:
            raise InputError(
                f"--position_embedding learned has {self.SIZE} rows and columns, a feature map is {height}×{width}: "
                "use smaller images (--min_size, --max_size), no --dilation, or --position_embedding sine"
            )
        x = self.col_embed.weight[:width].expand(height, -1, -1)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat((x, y), dim=-1).expand(batch, -1, -1, -1).permute(0, 3, 1, 2)


def build_position_encoding(args: argparse.Namespace) -> PositionEmbeddingSine | PositionEmbeddingLearned:
    """Return the position embedding of `args.position_embedding`, "sine" or "learned", for `args.hidden_dim`.

    Raise InputError for any other name.
    """
    num_pos_feats = args.hidden_dim // 2
    if args.position_embedding in ("sine", "v2"):  # v2 and v3 are the published code's other names
        return PositionEmbeddingSine(num_pos_feats, normalize=True)
    if args.position_embedding in ("learned", "v3"):
        return PositionEmbeddingLearned(num_pos_feats)
    raise InputError(f"--position_embedding {args.position_embedding}: choose one of sine, learned")
