"""Images whose file names differ from those in the annotations: they are found, or named as missing."""

import unicodedata
from functools import partial

import pytest
from PIL import Image

from tests.cells import SIZE, cells, load_cells
from util.errors import InputError


@pytest.fixture
def load(tmp_path):
    return partial(load_cells, tmp_path)


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("data/train/images/{}", "{}"),
        ("images\\{}", "{}"),
        ("C:\\data\\{}", "{}"),
        ("/home/somebody/{}", "{}"),
        ("../images/{}", "{}"),
        ("{}", "sub/{}"),
        ("my%20photo{}", "my photo{}"),
        (DECOMPOSED + "{}", COMPOSED + "{}"),
        (COMPOSED + "{}", DECOMPOSED + "{}"),
    ],
)
def test_files_with_a_slightly_different_name_are_found(written, stored, load, capsys):
    data = cells()
    for entry in data["images"]:
        entry["file_name"] = written.format(entry["file_name"])
    dataset = load(data, rename=stored.format)
    assert "4 of 4 images were found under a slightly different name, such as" in capsys.readouterr().out
    assert dataset[3][0].shape[0] == 3


def test_suffixes_may_differ_in_case(load):
    data = cells()
    for entry in data["images"]:
        entry["file_name"] = entry["file_name"].replace(".jpg", ".JPG")
    assert len(load(data)) == 4


def test_files_of_two_images_are_not_mixed_up(load, tmp_path):
    """A file is not used for a name if it belongs to another image, or if several files fit the name."""
    data = cells()
    data["images"][0]["file_name"] = "other/train02.jpg"
    with pytest.raises(InputError, match=r"1 of 4 images of .* is missing: other/train02.jpg"):
        load(data)
    (tmp_path / "train" / "a").mkdir()
    (tmp_path / "train" / "b").mkdir()
    for folder in "ab":
        Image.new("RGB", SIZE).save(tmp_path / "train" / folder / "x.jpg")
    data["images"][0]["file_name"] = "x.jpg"
    with pytest.raises(InputError, match=r"1 of 4 images of .* is missing: x.jpg"):
        load(data)
    data["images"][0]["file_name"] = "data/b/x.jpg"
    assert len(load(data)) == 4


@pytest.mark.parametrize("folder", ["masks", "Labels", "deep/SegmentationClass"])
def test_masks_and_labels_are_not_taken_for_photos(folder, load, tmp_path, capsys):
    data = cells()
    data["images"][0]["file_name"] = "x.png"
    other = tmp_path / "train" / folder / "x.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", SIZE).save(other)
    with pytest.raises(InputError, match=r"1 of 4 images of .* is missing: x.png"):
        load(data)
    (tmp_path / "train" / "photos").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "train" / "photos" / "x.png")
    assert load(data).records.file_name(0) == "photos/x.png"
    assert capsys.readouterr().out.count("such as 'photos/x.png' for 'x.png'") == 1
    data["images"][0]["file_name"] = f"data\\{folder}/x.png"
    assert load(data).records.file_name(0) == f"{folder}/x.png"
