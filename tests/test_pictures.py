"""Boxes and texts drawn on images of any size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

from evaluation.pictures import annotate, colour_of, contact_sheet, place_texts, text_colour


def shown(picture: Image.Image, label: int) -> np.ndarray:
    """Return the pixels of a picture that have the colour of a label, [H, W]."""
    return (np.asarray(picture) == colour_of(label)).all(2)


@pytest.mark.parametrize("size", [(100, 120), (640, 480), (2000, 1500), (8, 300), (1, 1)])
def test_boxes_are_drawn_at_their_places(size):
    image = Image.new("RGB", size)
    width, height = size
    x1, y1, x2, y2 = box = (width // 4, height // 2, width * 3 // 4, height * 7 // 8)
    picture = annotate(image, [box], [3], ["cat 0.87"])
    assert picture.size == size
    assert not np.asarray(image).any()  # the image itself does not change
    drawn = shown(picture, 3)
    assert drawn[y2, x1 : x2 + 1].all() or size[0] < 10  # in a narrow image, the text may cover the line
    assert drawn[(y1 + y2) // 2, [x1, x2]].all() or size[0] < 10
    assert drawn.mean() < 0.5 or size[0] < 10


def test_letters_and_lines_grow_with_the_image():
    extents = []
    for scale in (1, 4):
        picture = annotate(
            Image.new("RGB", (640 * scale, 480 * scale)), [(0, 300 * scale, 9, 310 * scale)], [1], ["cat"]
        )
        rows = np.flatnonzero(shown(picture, 1)[: 300 * scale].any(1))
        extents.append(len(rows))
    assert 12 <= extents[0] <= 24
    assert extents[1] == pytest.approx(4 * extents[0], rel=0.15)


@pytest.mark.parametrize("box", [(-50, -50, 40, 30), (90, 40, 300, 60), (40, -9, 60, 200), (500, 500, 600, 600)])
def test_texts_lie_inside_the_image(box):
    def extent(size, box):
        """Return the width of the text's background, and the number of rows with more than a fifth of that width."""
        rows = shown(annotate(Image.new("RGB", size), [box], [1], ["person 0.55"]), 1).sum(1)
        return rows.max(), (rows > rows.max() / 5).sum()

    whole_width, whole_height = extent((200, 54), (100, 30, 101, 31))  # as many pixels as 120×90: equal letters
    width, height = extent((120, 90), box)
    assert width >= whole_width > 60
    assert height >= whole_height > 10


def test_texts_of_equal_boxes_do_not_overlap_and_the_first_box_is_on_top():
    box = (20, 40, 100, 80)
    picture = annotate(Image.new("RGB", (200, 200)), [box, box], [1, 2], ["first 0.9", "second 0.8"])
    first, second = (shown(picture, label) for label in (1, 2))
    assert first[80, 20:101].all()  # the box of the first
    assert first[:40].sum() > 200  # its text is above the box
    assert second[40:].sum() > 200  # the text of the second is elsewhere
    assert not second[80, 90:101].any()


def test_masks_tint_the_picture():
    """The picture may have another size than the masks; the first mask is on top."""
    grey = Image.new("RGB", (40, 20), (100, 100, 100))
    masks = np.zeros((10, 20, 2), dtype=np.uint8, order="F")
    masks[:, :5, 0] = masks[:, :10, 1] = 1
    drawn = np.asarray(annotate(grey, [[24, 4, 36, 16]] * 2, [1, 2], ["", ""], mask_api.encode(masks)))
    colours = [np.array(colour_of(label)) for label in (1, 2)]
    below = (100 + colours[1]) / 2
    assert np.allclose(drawn[5:15, 2:8], (below + colours[0]) / 2, atol=3)
    assert np.allclose(drawn[5:15, 12:18], below, atol=3)
    assert (drawn[5:15, 22:23] == 100).all()


sides = st.integers(1, 200)
coordinates = st.floats(-50, 250)
crowds = st.lists(st.tuples(st.tuples(sides, st.integers(1, 30)), st.tuples(*[coordinates] * 4)), max_size=40)


@given(crowd=crowds, size=st.tuples(sides, sides))
def test_texts_never_overlap(crowd, size):
    """A text that has a place keeps its size and begins within the image; the first text always has a place."""
    places = place_texts([extent for extent, _ in crowd], [box for _, box in crowd], size)
    assert len(places) == len(crowd)
    assert None not in places[:1]
    covered = np.zeros((300, 500), dtype=int)
    for place, (extent, _) in zip(places, crowd, strict=True):
        if place:
            left, top, right, bottom = place
            assert (right - left, bottom - top) == extent
            assert left == 0 or (left > 0 and right <= size[0])
            assert top == 0 or (top > 0 and bottom <= size[1])
            covered[top:bottom, left:right] += 1
    assert covered.max(initial=0) <= 1


def test_only_the_first_of_many_equal_boxes_have_texts():
    boxes, texts = [(150, 150, 180, 180)] * 100, [f"{label} 0.50" for label in range(100)]
    picture = annotate(Image.new("RGB", (300, 300)), boxes, range(100), texts)
    sizes = [int(shown(picture, label).sum()) for label in range(100)]
    with_text = [label for label, size in enumerate(sizes) if size > 100]
    assert with_text == list(range(len(with_text)))
    assert 8 <= len(with_text) <= 20


def test_a_contact_sheet_has_cells_of_the_given_size():
    sheet = contact_sheet([Image.new("RGB", (100, 20), "red")] * 3, 2, (50, 30))
    assert sheet.size == (2 * 50 + 3 * 8, 2 * 30 + 3 * 8)
    assert (np.asarray(sheet) == (255, 0, 0)).all(2).sum() == 3 * 50 * 10


def test_texts_can_be_read_on_every_colour():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for label in range(100):
        dark, light = sorted(map(luminance, (colour_of(label), text_colour(colour_of(label)))))
        assert (light + 0.05) / (dark + 0.05) > 4.5  # what accessibility guidelines ask for
    assert len({colour_of(label) for label in range(90)}) == 90


def test_no_boxes_empty_texts_and_texts_without_glyphs_can_be_drawn():
    image = Image.new("RGB", (50, 50), "gray")
    assert annotate(image, [], [], []).tobytes() == image.tobytes()
    assert annotate(image, [(5, 20, 9, 30)], [0], [""]).tobytes() != image.tobytes()
    annotate(image, [(5, 20, 9, 30)], [0], ["猫 قط 0.50"])
