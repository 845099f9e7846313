"""Random number generators of a process: seeding, saving and restoring them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every generator that a library might draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def torch_rng_states() -> dict[str, Tensor]:
    """Return the states of torch's generators for the CPU and the current GPU, without waiting for it."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_torch_rng_states(states: dict[str, Tensor]) -> None:
    """Restore the generators to the states that `torch_rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def all_rng_states() -> dict[str, Any]:
    """Return the states of torch's, NumPy's and Python's generators as plain data, which is valid JSON."""
    of_numpy = np.random.get_state(legacy=False)
    return {
        "torch": {device: state.tolist() for device, state in torch_rng_states().items()},
        "numpy": [
            *(of_numpy["bit_generator"], of_numpy["state"]["key"].tolist(), of_numpy["state"]["pos"]),
            *(of_numpy["has_gauss"], of_numpy["gauss"]),
        ],
        "python": random.getstate(),
    }


def set_all_rng_states(states: dict[str, Any]) -> None:
    """Restore the generators to the states that `all_rng_states` returned."""
    set_torch_rng_states({k: torch.tensor(state, dtype=torch.uint8) for k, state in states["torch"].items()})
    np.random.set_state(tuple(states["numpy"]))
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
