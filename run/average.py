"""Moving average of a model's weights during training, which detects better than the weights of a single step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.checkpoint import load_model_weights
from run.step_guard import running_statistics


class MovingAverage:
    """Exponential moving average of the tensors that training changes: trained weights and running statistics.

    Step n, counted from 1, sets average = d * average + (1 - d) * model with d = min(decay, (1 + n) / (10 + n)). At
    first, the average follows the model closely, so that the initial weights are soon forgotten.

    Args:
        model: the model that is trained, with its initial weights.
        decay: the largest value of d, below 1.

    Attributes:
        model: a copy of the model with the averaged weights, for inference.
        steps: the number of steps so far, a tensor [] on the model's device, so that the host never waits for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay = decay
        self.steps = next(model.parameters()).new_zeros((), requires_grad=False)
        self.pairs = list(zip(*map(changing_tensors, (self.model, model)), strict=True))
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, left_out: Tensor) -> None:
        """Update the average after a step, unless the step was skipped: `left_out`, a tensor [] on the device, is 1."""
        taken = 1 - left_out.to(self.steps)
        self.steps += taken
        share = taken * (1 - ((1 + self.steps) / (10 + self.steps)).clamp(max=self.decay))
        for average, value in self.pairs:
            if average.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of steps."""
        return {"model": self.model.state_dict(), "steps": int(self.steps)}

    def restore(self, saved: dict[str, Any], source: str) -> None:
        """Continue from a saved state. Raise InputError if its weights do not fit; `source` names the checkpoint."""
        load_model_weights(self.model, saved, source)
        self.steps.fill_(saved["steps"])


def changing_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors of a model that its training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad] + running_statistics(model)
