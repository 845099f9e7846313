"""Position of a training run within an epoch, which exact resume needs in addition to weights and optimizer."""

from __future__ import annotations

import math
from typing import Any

from util.distributed import all_gather_plain, get_rank, get_world_size
from util.errors import InputError, reason
from util.logger import MetricLogger, SmoothedValue
from util.rng import all_rng_states, set_all_rng_states


class Progress:
    """Position within an epoch, and the averages up to this position.

    Attributes:
        step: the number of finished steps of the current epoch.
        logger: the averages over these steps, on this process.
    """

    def __init__(self) -> None:
        self.start_epoch()

    def start_epoch(self) -> None:
        """Start an epoch: no steps, and empty averages."""
        self.step = 0
        self.logger = MetricLogger()
        self.logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))

    def state_dict(self) -> dict[str, Any]:
        """Return plain data; `processes` lists what differs per process, by rank. Call this on all processes."""
        mine = {"random": all_rng_states(), "meters": self.logger.state_dict()}
        return {"step": self.step, "processes": all_gather_plain(mine)}

    def restore(self, checkpoint: dict[str, Any], images_per_step: int, source: str) -> None:
        """Continue from a checkpoint; a published one has no position, and is from the end of an epoch.

        If the number of processes or their `images_per_step` changed, the position is after the images already seen.

        Raises:
            InputError: if a random generator does not accept its state; `source` names the checkpoint.
        """
        if "processes" not in checkpoint:
            return
        processes = checkpoint["processes"]
        flags = checkpoint["args"]
        images_seen = checkpoint["step"] * flags["batch_size"] * flags["accum_steps"] * len(processes)
        self.step = math.ceil(images_seen / (images_per_step * get_world_size()))
        if get_rank() < len(processes):
            mine = processes[get_rank()]
            try:
                set_all_rng_states(mine["random"])
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"{source}: a random state does not fit the generators of this version ({reason(error)})"
                ) from error
            self.logger.load_state_dict(mine["meters"])
        else:  # the saved run had fewer processes: this one starts with the same names and empty averages
            nothing = SmoothedValue().state_dict()
            self.logger.load_state_dict(dict.fromkeys(processes[0]["meters"], nothing))
