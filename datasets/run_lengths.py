"""Checks of COCO's run-length codes of masks, since pycocotools' C code does not check them."""

from __future__ import annotations

import math
import re
from typing import Any

from pycocotools import mask as mask_api

NUMBERS = re.compile("([P-o]{0,5}[0-O])+")  # pycocotools' text: numbers of up to six digits, the last one marked
MOST_PIXELS = 2**32 - 1  # pycocotools counts pixels in 32 bits


def compressed(segmentation: dict[str, Any]) -> dict[str, Any] | None:
    """Return `size` [height, width] and `counts` (pycocotools' text as bytes); None unless the runs fill this size.

    The `counts` of `segmentation` are a list of run lengths or pycocotools' text.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    pixels = math.prod(size)
    if pixels > MOST_PIXELS:
        return None
    if isinstance(counts, str):
        fills = NUMBERS.fullmatch(counts) and sum(runs(counts)) == pixels
        return {"size": size, "counts": counts.encode()} if fills else None
    if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels:
        return mask_api.frPyObjects({"size": size, "counts": counts}, *size)
    return None


def runs(counts: str) -> list[int]:
    """Return the run lengths in pycocotools' text; [-1] if one is negative.

    From the fourth run, the text has the difference from the run two places before. A number is written in groups of
    five bits, the lowest first; a sixth bit marks that another group follows, and the fifth bit of the last group is
    the sign.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths if all(length >= 0 for length in lengths) else [-1]
