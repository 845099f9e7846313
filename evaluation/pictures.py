"""Pictures of images with boxes."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont, ImageOps

Colour = tuple[int, int, int]
Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels

TEXT_SCALE = 0.021  # the size of letters, relative to the side of a square of the image's area
MIN_TEXT, SMALLEST_TEXT = 10, 6  # pixels; the smallest only where a text would be wider than its image
CELL, GAP = (400, 300), 8  # pixels: width and height of a picture on a sheet, and what is between two
TITLE_SIZE = 16  # pixels, of the letters above a picture
FIRST_HUE, GOLDEN_RATIO = 0.92, 0.618034  # hues in steps of the golden ratio keep apart


def annotate(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """A copy of an RGB image with boxes (xyxy in pixels), a colour for each label, and a text at each box.

    Lines and letters grow with the image. The first boxes lie on top of later ones. Boxes that leave the image end at
    its border; texts lie inside it and, where there is room, beside each other. Quick enough for thousands of photos.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    size = max(MIN_TEXT, round(TEXT_SCALE * (image.width * image.height) ** 0.5))
    right, bottom = image.width - 1, image.height - 1
    inside = [
        (min(max(x1, 0), right), min(max(y1, 0), bottom), min(max(x2, 0), right), min(max(y2, 0), bottom))
        for x1, y1, x2, y2 in boxes
    ]
    fonts = [_font_for(text, size, image.width) for text in texts]
    places: list[Region] = []
    for box, text, font in zip(inside, texts, fonts, strict=True):
        extent = font.getlength(text) + 2 * _padding(font), sum(font.getmetrics())
        places.append(_place(extent, box, image.size, places))

    for box, label in reversed(list(zip(inside, labels, strict=True))):
        draw.rectangle(box, outline=colour_of(label), width=max(1, round(size / 6)))
    for place, text, font, label in reversed(list(zip(places, texts, fonts, labels, strict=True))):
        colour = colour_of(label)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + _padding(font), place[1]), text, text_colour(colour), font)
    return image


def side_by_side(panels: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """RGB images of one height in a row, on white, with a title above each."""
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


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side, each scaled to fit into a cell, from left to right and top to bottom."""
    rows = max(math.ceil(len(pictures) / columns), 1)
    sheet = Image.new("RGB", (columns * (CELL[0] + GAP) + GAP, rows * (CELL[1] + GAP) + GAP), "white")
    for i, picture in enumerate(pictures):
        fitted = ImageOps.contain(picture, CELL)
        left, top = (
            GAP + number * (side + GAP) for number, side in zip((i % columns, i // columns), CELL, strict=True)
        )
        sheet.paste(fitted, (left + (CELL[0] - fitted.width) // 2, top + (CELL[1] - fitted.height) // 2))
    return sheet


def colour_of(label: int) -> Colour:
    """A class's colour of 8 bits a channel, bright; those of neighbouring labels differ most."""
    hue = (FIRST_HUE + label * GOLDEN_RATIO) % 1
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.8, (1.0, 0.85)[label % 2]))


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in background)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def _place(extent: tuple[float, float], box: Region, size: tuple[int, int], taken: Sequence[Region]) -> Region:
    """Where in an image a text goes: above its box, else to another of its corners, the first that is not taken."""
    (width, height), (x1, y1, x2, y2) = extent, box
    places = []
    for y in (y1 - height, y1, y2, y2 - height):
        for x in (x1, x2 - width):
            left, top = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
            places.append((left, top, left + width, top + height))
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    return next(free, places[0])


def _overlap(a: Region, b: Region) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _font_for(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """A font of `size`, or of a smaller one where the text would be wider than `width`."""
    length = _font(size).getlength(text) + 2 * _padding(_font(size))
    return _font(max(SMALLEST_TEXT, min(size, int(size * width / length))))


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size / 5)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib; what it has no glyphs for, such as Chinese, it shows as empty squares."""
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def draw_boxes(
    axes: Axes,
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
    title: str = "",
) -> None:
    """Shows an image [H, W, 3] with boxes (xyxy in pixels), a colour for each label, and a text at each box."""
    colours = mpl.colormaps["tab10"].colors
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    for (x1, y1, x2, y2), label, text in zip(boxes, labels, texts, strict=True):
        colour = colours[label % len(colours)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.8))
        label_at = {"x": min(max(x1, 0), width), "y": min(max(y1, 0.08 * height), height)}  # inside, also at the border
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.text(**label_at, s=text, fontsize=7, color="white", va="bottom", ha="left", bbox=style, parse_math=False)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, parse_math=False)
