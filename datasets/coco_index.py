"""Pycocotools' index of the entries of an annotation file."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from pycocotools.coco import COCO


def index(data: dict[str, Any]) -> COCO:
    """Return pycocotools' index of a loaded annotation file, without printing its messages."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
