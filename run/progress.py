"""How far a training run has come, besides weights and optimizer: what resuming it exactly needs."""

from __future__ import annotations

import math
from typing import Any

import torch

from util.distributed import all_gather_plain, get_rank, get_world_size
from util.errors import InputError, reason
from util.logger import MetricLogger, SmoothedValue
from util.rng import all_rng_states, set_all_rng_states


class Progress:
    """The position within an epoch and what has been gathered on the way there.

    Attributes:
        step: the finished steps of the epoch under way.
        logger: the running averages over these steps, of this process.
        scaler: scales the loss where gradients are float16; does nothing otherwise.
        skipped: the steps of the run that were left out because they were not finite.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.start_epoch()
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.skipped = 0

    def start_epoch(self) -> None:
        """Begins with nothing gathered."""
        self.step = 0
        self.logger = MetricLogger()
        self.logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))

    def state_dict(self) -> dict[str, Any]:
        """Plain data; `processes` holds what differs by process, in rank order. To be called on all processes."""
        mine = {"random": all_rng_states(), "meters": self.logger.state_dict()}
        return {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "processes": all_gather_plain(mine),
        }

    def restore(self, checkpoint: dict[str, Any], images_a_step: int, source: str) -> None:
        """Continue from a checkpoint with this state in it; a published one, without, is an epoch's end.

        With other numbers of processes or of `images_a_step` of each, the position is after the images already seen.

        Raises:
            InputError: if a generator does not take its state; `source` names the checkpoint.
        """
        if "processes" not in checkpoint:
            return
        processes = checkpoint["processes"]
        flags = checkpoint["args"]
        images_seen = checkpoint["step"] * flags["batch_size"] * flags["accum_steps"] * len(processes)
        self.step = math.ceil(images_seen / (images_a_step * get_world_size()))
        self.skipped = checkpoint["skipped"]
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if get_rank() < len(processes):
            mine = processes[get_rank()]
            try:
                set_all_rng_states(mine["random"])
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"{source}: a random state is not one of this version's generators ({reason(error)})"
                ) from error
            self.logger.load_state_dict(mine["meters"])
        else:  # a process that the run did not have has nothing gathered, under the same names
            nothing = SmoothedValue().state_dict()
            self.logger.load_state_dict(dict.fromkeys(processes[0]["meters"], nothing))
