"""Images with more than 8 bits per channel, scaled to 8.

Files rarely say how many of their bits are in use: cameras store 10, 12 or 14 bits in 16, and floats end at 1, 255 or
65535. Therefore, white is the smallest of these usual maxima that is not below the image's largest value: images of one
camera are scaled alike, and nothing is clipped. If the image would be nearly black, or if values are negative or exceed
all maxima, the lowest value of the image becomes black and the highest white.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAXIMA = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16, 31, 32))
SLACK = 1 / 16  # of a maximum: darker images look black; floats may exceed the range by this much
BAND = 2**22  # pixels that are converted together, so that floats of a whole image are never in memory

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT = 258, 262, 281, 339  # TIFF tags
WHITE_IS_ZERO, UNSIGNED = 0, (1,)

# Pillow reads only the high byte of 16-bit colours. These raw modes pretend the other byte order to read the low byte;
# for grey with transparency, the mode separates all four bytes of a pixel.
LOW_BYTE = {
    f"{bands};16{order}": f"{bands};16{other}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
LOW_BYTE["LA;16B"] = "RGBA"


def to_rgb8(image: Image.Image, reopen: Callable[[], ImageFile]) -> tuple[np.ndarray, str]:
    """Return the pixels of an opened image, uint8 [H, W, 3], and a note if their scale is a guess, else "".

    Transparent pixels keep their colour.

    Args:
        image: an image of any mode, not yet loaded.
        reopen: opens the same file again, since 16-bit colours may need two passes.

    Raises:
        ValueError: if no value is finite. Pillow raises errors of many types for damaged files.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(lambda: _grey_bands(image), image)
    raw_mode = _raw_mode(image)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        rgb[rows] = np.asarray(band.convert("RGB"))
    if raw_mode in LOW_BYTE and rgb.max() < 2**6:  # at most 14 of the 16 bits are in use
        _set_raw_mode(low := reopen(), LOW_BYTE[raw_mode])
        channels = slice(1, 2) if raw_mode == "LA;16B" else slice(3)
        return _scaled(lambda: _colour_bands(rgb, low, channels), image)
    return rgb, ""


def _scaled(read: Callable[[], Iterator[tuple[slice, np.ndarray]]], image: Image.Image) -> tuple[np.ndarray, str]:
    """Scale an image to uint8 [H, W, 3]; `read` yields its rows in bands of values [h, W] or [h, W, 3]."""
    extremes: list[float] = []
    for _, values in read():
        finite = values[np.isfinite(values)]
        extremes += [float(finite.min()), float(finite.max())] if finite.size else []
    if not extremes:
        raise ValueError("it holds no finite value")
    declared, floats = _declared_maximum(image), image.mode == "F"
    black, white = _range(min(extremes), max(extremes), declared, floats)
    factor = 255 / (white - black) if white > black else 0
    inverted = _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO and image.mode in ("F", "I", "I;16", "I;16B")
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows, values in read():
        values = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black)
        levels = ((values - black) * factor + 0.5).clip(0, 255).astype(np.uint8)
        levels = 255 - levels if inverted else levels
        rgb[rows] = levels if levels.ndim == 3 else levels[..., None]
    if white in (declared, 2**16 - 1) or (floats and white == 1) or black == white == 0:
        return rgb, ""
    if black == 0 and white in MAXIMA:
        return rgb, f"more than 8 bits per channel; {white:,.0f} is taken as white"
    return rgb, "more than 8 bits per channel; the lowest value is taken as black, the highest as white"


def _range(lowest: float, highest: float, declared: float | None, floats: bool) -> tuple[float, float]:
    """Return the values that become black and white."""
    for white in (*((declared,) if declared else ()), *((1,) if floats else ()), *MAXIMA):
        slack = white * SLACK if floats else 0
        if lowest >= -slack and white * SLACK <= highest <= white + slack:
            return 0, white
    return lowest, highest


def _declared_maximum(image: Image.Image) -> float | None:
    """Return the largest possible value according to the file, or None if the file does not declare it."""
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled it by the header's maximum
        return 2**16 - 1
    if _tag(image, BITS_PER_SAMPLE) == (12,):
        return 2**12 - 1
    values = _tag(image, MAX_SAMPLE_VALUE)
    value = values[0] if isinstance(values, tuple) and values else values
    return value if isinstance(value, int) else None


def _tag(image: Image.Image, number: int) -> Any:
    """Return a TIFF tag; None if it is missing, as in other formats."""
    return image.tag_v2.get(number) if isinstance(image, TiffImageFile) else None


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield the rows of an image in bands, each with its slice."""
    rows = max(BAND // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _grey_bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the grey values of bands, [h, W], each with its slice."""
    unsigned = image.mode == "I" and _tag(image, SAMPLE_FORMAT) in (None, UNSIGNED) and image.format == "TIFF"
    for rows, band in _bands(image):
        values = np.asarray(band)
        yield rows, values.view(np.uint32) if unsigned else values


def _colour_bands(high: np.ndarray, low: Image.Image, channels: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the values of 16-bit colours, [h, W, 3], from high bytes [H, W, 3] and an image of the low bytes."""
    for rows, band in _bands(low):
        yield rows, high[rows] * np.uint16(256) + np.asarray(band.convert("RGB"))[..., channels]


def _raw_mode(image: Image.Image) -> str | None:
    """Return the layout of the stored pixels of an image that is not yet loaded; None for formats without one."""
    if not isinstance(image, ImageFile) or not image.tile:
        return None
    args = image.tile[0][3]
    return args if isinstance(args, str) else args[0] if args and isinstance(args[0], str) else None


def _set_raw_mode(image: ImageFile, raw_mode: str) -> None:
    """Make Pillow read an image that is not yet loaded as if its pixels were stored in another layout."""
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:]))
        for tile in image.tile
    ]
