"""Panoptic data: boxes, masks and classes of segments, and bad files and entries."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.panoptic import PanopticDetection
from datasets.panoptic_file import load_panoptic
from models.postprocess_masks import png_of_ids
from tests.panoptic import edit, read, write_panoptic, write_two
from util.errors import InputError


@pytest.fixture
def two(tmp_path) -> Path:
    """Return a folder with panoptic data of two images."""
    return write_two(tmp_path)


def test_boxes_areas_and_masks_come_from_the_pixels(two):
    dataset = read(two, masks=True)
    assert dataset.ids == [4, 11]
    target = dataset.target_of(0, 30, 20)
    assert target["labels"].tolist() == [2, 1, 7]
    assert target["boxes"].tolist() == [[3, 2, 11, 9], [5, 10, 24, 17], [0, 18, 29, 19]]
    assert target["area"].tolist() == [72, 160, 60]
    assert target["iscrowd"].tolist() == [0, 1, 0]  # crowds are targets in panoptic data
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].flatten(1).sum(1).tolist() == [72, 160, 60]
    assert "masks" not in read(two).target_of(0, 30, 20)
    assert dataset.classes.isthing == {1: True, 2: True, 7: False, 9: False}
    assert dataset.summary().boxes == 4


def test_records_of_panoptic_data_survive_sharing_and_selection(two):
    dataset = read(two, masks=True, share=True)  # through the arrays that processes exchange
    assert dataset.classes.isthing[7] is False
    dataset.keep_first(1, at_least=3)
    assert [dataset.segments.files.at(i) for i in range(len(dataset))] == ["4.png"] * 3
    assert dataset.records.segment_ids_of(2).tolist() == [70_000, 300, 5]
    assert len(dataset[2][1]["labels"]) == 3


def test_segments_without_pixels_or_one_pixel_wide_are_not_targets(tmp_path):
    ids = np.full((8, 8), 1)
    ids[:, 3] = 2  # a single column
    write_panoptic(tmp_path, {1: ids}, {1: [(1, 7, 0), (2, 1, 0), (3, 2, 0)]})
    target = read(tmp_path, masks=True).target_of(0, 8, 8)
    assert target["labels"].tolist() == [7]


def delete_png(root):
    (root / "panoptic" / "4.png").unlink()


def write_larger_png(root):
    Image.new("RGB", (30, 21)).save(root / "panoptic" / "4.png")


def truncate_png(root):
    path = root / "panoptic" / "4.png"
    path.write_bytes(path.read_bytes()[:50])


def add_segments(root):
    ids = torch.full((20, 30), 300)
    ids[0, :4] = torch.tensor([1, 2, 3, 3])
    (root / "panoptic" / "4.png").write_bytes(png_of_ids(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete_png, r"1 of 2 images .* missing: 4.png"),
        (write_larger_png, r"4.png \(image id 4\): is 30×21, but its image is 30×20"),
        (truncate_png, r"4.png \(image id 4\): cannot be decoded"),
        (add_segments, r"4.png \(image id 4\): contains segment 1 and 2 others, which .*panoptic.json does not list"),
    ],
)
def test_bad_png_files_are_named_or_skipped(two, change, message, capsys):
    change(two)
    with pytest.raises(InputError, match=message):
        read(two)[0]
    dataset = read(two, on_bad_image="skip")
    assert dataset[0][1]["image_id"].tolist() == [11]
    assert "4.jpg (image id 4)" in dataset.describe_skipped(dataset.take_skipped())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "it has no list 'categories'"),
        (lambda d: d["annotations"].__setitem__(0, {"bbox": [1, 1, 2, 2]}), "an instance file"),
        (lambda d: d["categories"][0].pop("isthing"), "category id 1: 'isthing' must be 1"),
        (lambda d: d["annotations"][1].pop("file_name"), "annotation number 1: must have 'file_name'"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "image id 11 already has an annotation"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(id=0), "integer from 1 to 16777215"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(id=5), "segment id 5 is used twice"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(category_id=3), "segment id 70000: its category_id"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(iscrowd=2), "'iscrowd' must be 0 or 1"),
        (lambda d: d["annotations"][1].update(segments_info=[3]), "the id of each segment"),
    ],
)
def test_bad_entries_are_named(two, change, message):
    edit(two / "panoptic.json", change)
    with pytest.raises(InputError, match=f"panoptic.json: .*{message}"):
        read(two)


def test_entries_that_are_left_out_are_counted(two, capsys):
    edit(two / "panoptic.json", lambda d: d["annotations"][0].update(image_id=77))
    assert read(two).ids == [4]
    printed = capsys.readouterr().out
    assert "1 annotation of images that the file does not list: left out" in printed
    assert "1 image without an annotation left out" in printed


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_is_read_or_gives_one_line(two, data):
    """A value of any type in any place of the file gives samples, or one line that names the file."""
    contents = json.loads((two / "panoptic.json").read_text())
    annotation = contents["annotations"][1]
    place = data.draw(st.sampled_from([contents, contents["images"][0], annotation, annotation["segments_info"][0]]))
    key = data.draw(st.sampled_from(sorted({*place, "bbox", "area"})))
    place[key] = data.draw(VALUES)
    (two / "changed.json").write_text(json.dumps(contents))
    try:
        dataset = PanopticDetection(two / "images", two / "changed.json", two / "panoptic", transforms=lambda *s: s[:2])
        for index in range(len(dataset)):
            _ = dataset[index]
    except InputError as error:
        assert "\n" not in str(error)
        assert str(two) in str(error)


def test_a_published_file_is_read_with_gzip(two):
    packed = two / "panoptic.json.gz"
    packed.write_bytes(gzip.compress((two / "panoptic.json").read_bytes()))
    assert len(load_panoptic(packed).annotations) == 4
