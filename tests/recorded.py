"""Run main.py, and save the model of each process in the output folder: before training, and before evaluation."""

import os
import sys
from pathlib import Path

import torch

import main
import training
from util.distributed import get_rank


def recording(function, moment: str):
    """Wrap a function whose first argument is a parallel model or a step: save the model's state before the call."""

    def recorded(first, *args, **kwargs):
        parallel_model = first if hasattr(first, "module") else first.model
        output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
        torch.save(parallel_model.module.state_dict(), output_dir / f"{moment}-{get_rank()}.pt")
        return function(first, *args, **kwargs)

    return recorded


def run(rank: int, flags: list[str], meeting: dict[str, str]) -> None:
    """Run main.py as one of two processes; only for a new process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} | meeting
    sys.argv = ["main.py", *flags]
    training.take_steps = recording(training.take_steps, "start")
    main.evaluate = recording(main.evaluate, "evaluated")
    main.run()
