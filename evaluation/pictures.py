"""Drawing of boxes, masks and texts on images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as mask_api

Colour = tuple[int, int, int]
Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels

TEXT_SCALE = 0.021  # height of letters / square root of the image's area
MIN_TEXT, SMALLEST_TEXT = 10, 6  # pixels; below the first only if a text would be wider than its image
CELL, GAP = (400, 300), 8  # pixels: width and height of a picture on a sheet, and the gap between two
TINT = 0.5  # opacity of masks
TITLE_SIZE = 16  # pixels, of the letters above a picture
FIRST_HUE, GOLDEN_RATIO = 0.92, 0.618034  # hues in steps of the golden ratio are easy to tell apart


def annotate(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
    masks: Sequence[dict[str, Any]] = (),
) -> Image.Image:
    """Return a copy of an RGB image with boxes (xyxy in pixels), a colour per label, and a text at each box.

    `masks`, if any, are the boxes' masks as COCO's run-length codes, which are scaled to the image and tint it.

    The first boxes and masks are drawn on top of later ones. Lines and letters grow with the image. Boxes are clipped
    to the image, and texts lie inside it. Texts do not overlap: in dense groups, later boxes have none.
    """
    image = tinted(image, masks, [colour_of(label) for label in labels])
    draw = ImageDraw.Draw(image)
    limits = np.array([image.width, image.height] * 2) - 1
    inside = np.clip(np.reshape(boxes, (-1, 4)), 0, limits).tolist()
    for box, label in reversed(list(zip(inside, labels, strict=True))):
        draw.rectangle(box, outline=colour_of(label), width=max(1, round(_text_size(image.size) / 6)))
    draw_texts(draw, image.size, inside, labels, texts)
    return image


def draw_texts(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
) -> None:
    """Write a text at each box (xyxy) of an image of `size`, on the colour of its label, if there is room for it."""
    fonts = [_font_for(text, _text_size(size), size[0]) for text in texts]
    extents = [
        (math.ceil(font.getlength(text)) + 2 * _padding(font), sum(font.getmetrics()))
        for text, font in zip(texts, fonts, strict=True)
    ]
    places = place_texts(extents, boxes, size)
    for place, text, font, label in zip(places, texts, fonts, labels, strict=True):
        if place:
            left, top, right, bottom = place
            draw.rectangle((left, top, right - 1, bottom - 1), fill=colour_of(label))
            draw.text((left + _padding(font), top), text, text_colour(colour_of(label)), font)


def tinted(image: Image.Image, masks: Sequence[dict[str, Any]], colours: Sequence[Colour]) -> Image.Image:
    """Return a copy of an RGB image with masks (run-length codes) in half-transparent colours, the first on top."""
    image = image.copy()
    for mask, colour in reversed(list(zip(masks, colours, strict=False))):
        alpha = Image.fromarray(mask_api.decode(mask) * round(255 * TINT)).resize(image.size)
        image.paste(colour, mask=alpha)
    return image


def place_texts(
    extents: Sequence[tuple[int, int]], boxes: Sequence[Sequence[float]], size: tuple[int, int]
) -> list[Region | None]:
    """Return the region of each box's text in an image of `size`; None if there is no room at its box.

    Args:
        extents: (width, height) of each text.
        boxes: xyxy, in order of priority.
    """
    places: list[Region | None] = []
    taken = np.zeros((0, 4))
    for extent, box in zip(extents, boxes, strict=True):
        candidates = _places_at(box, extent, size)
        overlap = (candidates[:, None, :2] < taken[:, 2:]) & (taken[:, :2] < candidates[:, None, 2:])  # [C, T, 2]
        free = candidates[~(overlap[..., 0] & overlap[..., 1]).any(1)]
        places.append(tuple(free[0].tolist()) if len(free) else None)
        taken = np.concatenate([taken, free[:1]])
    return places


def side_by_side(panels: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Return a row of RGB images of equal height on white, with a title above each."""
    fonts = [_font_for(title, TITLE_SIZE, panel.width) for title, panel in zip(titles, panels, strict=True)]
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    top = 2 * TITLE_SIZE
    picture = Image.new("RGB", (width, top + panels[0].height), "white")
    draw, left = ImageDraw.Draw(picture), 0
    for panel, title, font in zip(panels, titles, fonts, strict=True):
        draw.text((left + panel.width / 2, top / 2), title, "black", font, anchor="mm")
        picture.paste(panel, (left, top))
        left += panel.width + GAP
    return picture


def contact_sheet(pictures: Sequence[Image.Image], columns: int, cell: tuple[int, int] = CELL) -> Image.Image:
    """Return a grid of pictures, each scaled to fit its cell, from left to right and top to bottom."""
    rows = max(math.ceil(len(pictures) / columns), 1)
    sheet = Image.new("RGB", (columns * (cell[0] + GAP) + GAP, rows * (cell[1] + GAP) + GAP), "white")
    for i, picture in enumerate(pictures):
        fitted = ImageOps.contain(picture, cell)
        left, top = (
            GAP + number * (side + GAP) for number, side in zip((i % columns, i // columns), cell, strict=True)
        )
        sheet.paste(fitted, (left + (cell[0] - fitted.width) // 2, top + (cell[1] - fitted.height) // 2))
    return sheet


def colour_of(label: int) -> Colour:
    """Return the bright colour of a class, 8 bits per channel; neighbouring labels have very different colours."""
    hue = (FIRST_HUE + label * GOLDEN_RATIO) % 1
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, (1.0, 0.85)[label % 2]))
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Return black or white, whichever is easier to read on this background."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in background)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def _places_at(box: Sequence[float], extent: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the possible regions [C, 4] of a box's text, the best first: above the upper left corner."""
    (x1, y1, x2, y2), (width, height) = box, extent
    rows = (y1 - height, y1, y2, y2 - height)  # above the box, in it, below it, in it
    columns = (x1, x2 - width, (x1 + x2 - width) / 2, x1 - width, x2)  # at its ends, its middle, and next to it
    corners = np.round([(x, y) for x in columns for y in rows])
    corners = np.clip(corners, 0, np.maximum(np.subtract(size, extent), 0)).astype(int)
    return np.concatenate([corners, corners + extent], axis=1)


def _text_size(size: tuple[int, int]) -> int:
    """Return the height of letters in an image of `size`, in pixels."""
    return max(MIN_TEXT, round(TEXT_SCALE * (size[0] * size[1]) ** 0.5))


def _font_for(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """Return a font of `size`, or a smaller one if the text would be wider than `width`."""
    length = _font(size).getlength(text) + 2 * _padding(_font(size))
    return _font(max(SMALLEST_TEXT, min(size, int(size * width / length))))


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size / 5)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib; characters without a glyph, such as Chinese, become empty squares."""
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
