"""Published checkpoints and logs, by the names of the hub entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from checkpoints.weight_flags import model_of

CONDITIONAL_DETR = "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/ConditionalDETR_{}_epoch50.pth"
DETR = "https://dl.fbaipublicfiles.com/detr/detr-{}.pth"


class Published(NamedTuple):
    """Address of a checkpoint, and the flags of its model that differ from the model's defaults."""

    url: str
    flags: dict[str, Any]


VARIANTS: dict[str, dict[str, Any]] = {
    "resnet50": {},
    "resnet50_dc5": {"dilation": True},
    "resnet101": {"backbone": "resnet101"},
    "resnet101_dc5": {"backbone": "resnet101", "dilation": True},
}
FILES = {
    "conditional_detr": (CONDITIONAL_DETR, ("r50", "r50dc5", "r101", "r101dc5")),
    "detr": (DETR, ("r50-e632da11", "r50-dc5-f0fb7ef5", "r101-2c7b67e5", "r101-dc5-a2e86def")),
}
PUBLISHED = {
    f"{model}_{variant}": Published(address.format(file), {"model": model} | flags)
    for model, (address, files) in FILES.items()
    for (variant, flags), file in zip(VARIANTS.items(), files, strict=True)
}
PANOPTIC_FILES = {
    "resnet50": "r50-panoptic-00ce5173",
    "resnet50_dc5": "r50-dc5-panoptic-da08f1b1",
    "resnet101": "r101-panoptic-40021d53",
}
PUBLISHED |= {
    f"detr_{variant}_panoptic": Published(DETR.format(file), {"model": "detr", "masks": True} | VARIANTS[variant])
    for variant, file in PANOPTIC_FILES.items()
}
LOGS = {
    f"detr_{variant}": f"https://dl.fbaipublicfiles.com/detr/logs/detr-{name}_log.txt"
    for variant, name in zip(VARIANTS, ("r50", "r50-dc5", "r101", "r101-dc5"), strict=True)
}


def known_flags(source: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the flags of a published model, since DETR's published files contain only weights.

    Args:
        source: a name in `PUBLISHED`, a path or a URL; files are recognised by their published file names.
        weights: the state dict.

    Return an empty dict for weights of Conditional DETR under another name, which may have any flags.
    """
    model = model_of(weights)
    for name, published in PUBLISHED.items():
        if source == name or source.endswith(published.url.rpartition("/")[2]):
            return published.flags
    return {"model": model} if model == "detr" else {}
