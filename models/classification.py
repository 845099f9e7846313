"""How logits tell classes: the matching cost, the loss and the scores of detections belong together.

Shapes: L decoder layers, B images, Q queries, K logits, T targets of all images, M matched pairs per layer,
N detections per image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

GAMMA = 2  # of the focal loss
EPS = 1e-8


class FocalSigmoid:
    """One sigmoid per class, trained by the focal loss (Lin et al., ICCV 2017; Conditional DETR, section 4.1).

    Args:
        alpha: the focal loss's weight of positives.
    """

    def __init__(self, alpha: float = 0.25) -> None:
        self.alpha = alpha

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the cost of giving each target to each query of its image, [T, L, Q].

        Args:
            logits: [L, B, Q, K].
            image, labels: [T], the image and the class of each target.
        """
        p = logits.permute(1, 3, 0, 2)[image, labels].sigmoid()  # [T, L, Q], of the target's class
        negative = (1 - self.alpha) * p**GAMMA * -(1 - p + EPS).log()
        positive = self.alpha * (1 - p) ** GAMMA * -(p + EPS).log()
        return positive - negative

    def loss(self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor, num_boxes: Tensor) -> Tensor:
        """Return the focal loss over all queries and classes per target, [L].

        Args:
            logits: [L, B, Q, K].
            pairs: layer, image and query of the matched pairs, [L, M] each.
            labels: [L, M], their classes.
            num_boxes: the number of targets to divide by.
        """
        one_hot = torch.zeros_like(logits)
        one_hot.index_put_((*pairs, labels), one_hot.new_ones(()))  # of a plain 1, the host would wait for the copy
        return sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=GAMMA).sum((1, 2, 3)) / num_boxes

    def scores(self, logits: Tensor, num_detections: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the highest of all queries and classes: scores in descending order, labels and queries, [B, N] each.

        logits: [B, Q, K]; N is `num_detections`, or Q·K if that is less.
        """
        scores, index = logits.sigmoid().flatten(1).topk(min(num_detections, logits.shape[1] * logits.shape[2]))
        return scores, index % logits.shape[2], index // logits.shape[2]
