"""Pretrained weights of the backbone."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from checkpoints.checkpoint import check_finite, fits
from checkpoints.checkpoint_schema import weights as check_weights
from checkpoints.torch_file import load_file
from models.backbone import Backbone
from util.errors import InputError
from util.files import download
from util.text import counted


def load_backbone_weights(backbone: Backbone, name: str, source: str) -> None:
    """Load torchvision's ImageNet V1 weights ("imagenet", downloaded once) or the weights in a file into a backbone.

    Raises:
        InputError: if the download fails or the file does not contain such weights.
    """
    if source == "imagenet":
        url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        advice = f"place {path.name} from {url} at {path} or name it with --backbone_weights PATH"
    else:
        path, advice = Path(source), f"--backbone_weights takes a state dict of torchvision's {name}"
    advice += ", or train without pretrained weights with --backbone_weights none --backbone_norm batch"

    if source == "imagenet" and not path.exists():
        try:
            download(url, path, hash_prefix=path.stem.rsplit("-", 1)[-1], progress=False)
        except (OSError, RuntimeError) as error:
            raise InputError(f"the ImageNet weights {path.name} could not be downloaded ({error}); {advice}") from error
    try:
        weights = check_weights(load_file(path, path), f"{path}: the state dict")
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    ours, theirs = backbone.body.state_dict(), {k: v for k, v in weights.items() if not k.startswith("fc.")}
    different = {key for key in ours.keys() | theirs.keys() if not fits(ours.get(key), theirs.get(key))}
    # Old files lack the batch counter of batch norms, and frozen norms have none.
    if wrong := sorted(key for key in different if not key.endswith("num_batches_tracked")):
        keys = counted(len(wrong), "key differs", "keys differ")
        raise InputError(f"{path}: not the weights of {name} ({keys}, such as {wrong[0]}); {advice}")
    check_finite(theirs, path)
    backbone.body.load_state_dict({k: v for k, v in theirs.items() if k not in different}, strict=False)
