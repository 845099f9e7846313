"""Classification: the meaning of class logits in the matching cost, the loss and the scores of detections.

Shapes: L decoder layers, B images, Q queries, K logits, T targets of all images, M matched pairs per layer,
N detections per image.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

GAMMA = 2  # of the focal loss
EPS = 1e-8


class Totals(NamedTuple):
    """Numbers of targets in all batches of a training step.

    num_boxes: the number of targets, averaged over the processes.
    per_image: the number of targets in each image of this process.
    """

    num_boxes: Tensor
    per_image: list[int]


class Classification(Protocol):
    """Meaning of a model's class logits."""

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the cost of assigning each target to each query of its image, [T, L, Q].

        Args:
            logits: [L, B, Q, K].
            image, labels: [T], the image and the class of each target.
        """
        ...

    def loss(self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor, totals: Totals) -> Tensor:
        """Return the loss of each decoder layer, [L].

        Args:
            logits: [L, B, Q, K].
            pairs: layer, image and query of the matched pairs, [L, M] each.
            labels: [L, M], the classes of their targets.
            totals: the numbers of targets by which the loss is divided.
        """
        ...

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, [.., number of classes], for logits [.., K]."""
        ...

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the highest probability and its class for each query, [..] each, for logits [.., K].

        The probability is 0 if "no object" is better than all classes.
        """
        ...

    def scores(self, logits: Tensor, num_detections: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores, labels and queries of at most `num_detections` detections, [B, N] each.

        logits: [B, Q, K].
        """
        ...


class FocalSigmoid:
    """One sigmoid per class, trained by the focal loss of Lin et al., ICCV 2017, as Conditional DETR is.

    Args:
        alpha: the focal loss's weight of positives.
    """

    def __init__(self, alpha: float = 0.25) -> None:
        self.alpha = alpha

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the focal loss of predicting the target's class, minus that of not predicting it, [T, L, Q]."""
        p = logits.permute(1, 3, 0, 2)[image, labels].sigmoid()  # [T, L, Q], of the target's class
        negative = (1 - self.alpha) * p**GAMMA * -(1 - p + EPS).log()
        positive = self.alpha * (1 - p) ** GAMMA * -(p + EPS).log()
        return positive - negative

    def loss(self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor, totals: Totals) -> Tensor:
        """Return the focal loss, summed over all queries and classes and divided by the number of targets, [L]."""
        one_hot = torch.zeros_like(logits)
        one_hot.index_put_((*pairs, labels), one_hot.new_ones(()))  # with a plain 1, the host would wait for the copy
        return sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=GAMMA).sum((1, 2, 3)) / totals.num_boxes

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoids."""
        return logits.sigmoid()

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the highest sigmoid and its class."""
        scores, labels = self.probabilities(logits).max(-1)
        return scores, labels

    def scores(self, logits: Tensor, num_detections: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the highest scores of all queries and classes, in descending order; a query may have several."""
        num_detections = min(num_detections, logits.shape[1] * logits.shape[2])
        scores, index = self.probabilities(logits).flatten(1).topk(num_detections)
        return scores, index % logits.shape[2], index // logits.shape[2]


class SoftmaxWithNoObject:
    """Softmax over the classes and, as the last logit, "no object" (DETR, section 3.1).

    Args:
        eos_coef: the weight of "no object" in the cross-entropy.
    """

    def __init__(self, eos_coef: float = 0.1) -> None:
        self.eos_coef = eos_coef

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the negative probability of the target's class, [T, L, Q]."""
        return -logits.softmax(-1).permute(1, 3, 0, 2)[image, labels]

    def loss(self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor, totals: Totals) -> Tensor:
        """Return the weighted mean of the cross-entropy over the queries of the step, [L]."""
        num_layers, _, num_queries, num_logits = logits.shape
        classes = torch.full(logits.shape[:3], num_logits - 1, device=logits.device)  # [L, B, Q], "no object"
        classes[pairs] = labels
        weights = logits.new_ones(num_logits)
        weights[-1:] = self.eos_coef
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weights, reduction="none")
        matched = sum(min(num_queries, objects) for objects in totals.per_image)
        unmatched = num_queries * len(totals.per_image) - matched
        return loss.view(num_layers, -1).sum(1) / (matched + self.eos_coef * unmatched)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax without "no object"."""
        return logits.softmax(-1)[..., :-1]

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the highest probability and its class; the probability is 0 if "no object" is best."""
        scores, labels = logits.softmax(-1).max(-1)
        return scores.masked_fill(labels == logits.shape[-1] - 1, 0), labels

    def scores(self, logits: Tensor, num_detections: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best class of the `num_detections` queries with the highest scores, in the order of queries."""
        scores, labels = self.probabilities(logits).max(-1)  # [B, Q]
        queries = torch.arange(logits.shape[1], device=logits.device).expand_as(scores)
        if num_detections < logits.shape[1]:
            queries = scores.topk(num_detections).indices.sort().values
            scores, labels = scores.gather(1, queries), labels.gather(1, queries)
        return scores, labels, queries
