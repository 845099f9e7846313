"""Checkpoints for the tests of conversion."""

from pathlib import Path

import torch

from main import get_args_parser
from models import build_model
from tests.reference import reference_weights, sharpened

OWN_CLASSES = {
    "class_ids": {0: "ant", 1: 70_000, 2: 4},
    "class_names": {0: "Ameise", 1: "bee", 2: "N/A?"},
    "class_isthing": {0: 1, 1: 0, 2: 1},  # as those of panoptic data
}


def save(path: Path, *flags: object, num_classes: int = 91, sharp: bool = False, **more) -> Path:
    """Save a checkpoint with weights like those of a trained model; with `sharp`, its queries differ strongly."""
    args = get_args_parser().parse_args([*map(str, flags), "--num_classes", str(num_classes)])
    model, _, _ = build_model(args)
    weights = reference_weights(model.state_dict())
    weights = sharpened(weights) if sharp else weights
    torch.save({"model": weights, "args": vars(args), "epoch": 3, **more}, path)
    return path
