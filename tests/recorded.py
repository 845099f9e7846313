"""main.py that leaves the state of each process's model in the output folder: before training, and as evaluated."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import main
import training
from util.distributed import get_rank


def recording(function, moment: str):
    """Return a function that saves the state of its first argument, a parallel model or a step, before it is called."""

    def recorded(first, *args, **kwargs):
        parallel_model = first if hasattr(first, "module") else first.model
        output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
        torch.save(parallel_model.module.state_dict(), output_dir / f"{moment}-{get_rank()}.pt")
        return function(first, *args, **kwargs)

    return recorded


if __name__ == "__main__":
    training.take_steps = recording(training.take_steps, "start")
    main.evaluate = recording(main.evaluate, "evaluated")
    main.run()
