"""Data sets that `--dataset_file` and `--coco_path` select, and their batches.

The functions are imported when they are first used, so that `python -m datasets.shapes` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["build_dataset", "build_loader", "get_coco_api_from_dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.build"), name)
