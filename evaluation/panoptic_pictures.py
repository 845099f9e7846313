"""Pictures of panoptic segmentations: each segment in the colour of its class, with a border and a name."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from datasets.classes import Classes
from evaluation.pictures import colour_of, draw_texts

TINT = 0.6  # opacity of segments
BORDER = (255, 255, 255)
MIDDLE_SIDE = 200  # pixels: larger masks are reduced before the search for their middle, to save time


def draw_segments(
    image: Image.Image, ids: np.ndarray, segments: Iterable[tuple[int, int]], classes: Classes
) -> Image.Image:
    """Return a copy of an RGB image with coloured segments and their names; the largest ones are named first.

    Args:
        image: of any size.
        ids: [H, W], the segment id of each pixel; scaled to the image.
        segments: (id, label) of each segment; pixels of other ids stay unchanged.
        classes: the names of the labels.
    """
    ids = np.asarray(Image.fromarray(ids.astype(np.int32)).resize(image.size, Image.Resampling.NEAREST))
    numbers, index = np.unique(ids, return_inverse=True)
    index = index.reshape(ids.shape)  # [H, W], positions in `numbers`
    label_of = dict(segments)
    shown = [number in label_of for number in numbers.tolist()]
    colours = [colour_of(label_of.get(number, 0)) for number in numbers.tolist()]
    painted = Image.blend(image, Image.fromarray(np.array(colours, dtype=np.uint8)[index]), TINT)
    picture = Image.composite(painted, image, Image.fromarray(np.where(shown, 255, 0).astype(np.uint8)[index]))
    picture.paste(BORDER, mask=Image.fromarray(np.where(borders(index), 255, 0).astype(np.uint8)))
    largest_first = np.argsort(-np.bincount(index.ravel()), kind="stable").tolist()
    named = [i for i in largest_first if shown[i]]
    labels = [label_of[int(numbers[i])] for i in named]
    places = [middle_of(index == i) for i in named]
    texts = [classes.name_of(label) for label in labels]
    draw_texts(ImageDraw.Draw(picture), picture.size, [(x, y, x, y) for x, y in places], labels, texts)
    return picture


def borders(ids: np.ndarray) -> np.ndarray:
    """Return a mask [H, W] of the pixels that differ from their right or lower neighbour."""
    edges = np.zeros(ids.shape, dtype=bool)
    edges[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    edges[:-1] |= ids[:-1] != ids[1:]
    return edges


def middle_of(mask: np.ndarray) -> tuple[int, int]:
    """Return the (x, y) of the pixel of a mask [H, W] that is farthest from its border."""
    step = max(1, max(mask.shape) // MIDDLE_SIDE)
    distances = distance_transform_edt(np.pad(mask[::step, ::step], 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distances.argmax(), distances.shape)
    return int(column) * step, int(row) * step
