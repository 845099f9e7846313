"""Layouts of data sets that --coco_path finds."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from datasets import build_dataset
from tests.cells import cells
from util.errors import InputError

LAYOUTS = {
    "roboflow": ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
    "one_folder": ("annotations/train.json", "images", "annotations/val.json", "images"),
    "folders": ("annotations/train.json", "images/train", "annotations/val.json", "images/val"),
    "without_year": ("annotations/instances_train.json", "train", "annotations/instances_val.json", "val"),
    "compressed": (
        "annotations/instances_train2017.json.gz",
        "train2017",
        "annotations/instances_val2017.json",
        "val2017",
    ),
    "flat": ("train.json", "train", "validation.json", "validation"),
    "other_case": ("Annotations/instances_Train.json", "Images/Train", "Annotations/VAL.json", "Images/Val"),
    "exports": (
        "train/annotations/instances_default.json",
        "train/images/default",
        "Validation/annotations/instances_Validation.json.gz",
        "Validation/images",
    ),
}


def write_split(root: Path, split: str, file: str, folder: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(cells(split)).encode()
    (root / file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)
    for entry in cells(split)["images"]:
        Image.new("RGB", (160, 120)).save(root / folder / entry["file_name"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found(layout, tmp_path, parse, capsys):
    places = LAYOUTS[layout]
    for split, file, folder in zip(("train", "val"), places[::2], places[1::2], strict=True):
        write_split(tmp_path, split, file, folder)
    for split in ("train", "val"):
        assert build_dataset(split, parse("--coco_path", tmp_path)).summary().boxes == 12
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("folder", ["images", "images/default"])
def test_an_export_without_the_name_of_a_split_is_used_for_one_split_only(folder, tmp_path, parse):
    """It is used if only one split is needed; used for both, it would evaluate the model on its training data."""
    write_split(tmp_path, "val", "annotations/instances_default.json", folder)
    path = "--coco_path", tmp_path
    assert build_dataset("val", parse(*path, "--eval")).summary().boxes == 12
    assert build_dataset("train", parse(*path, "--val_annotations", "other.json")).summary().boxes == 12
    assert build_dataset("train", parse(*path, "--overfit", 2)).summary().boxes > 0
    with pytest.raises(InputError, match=r"it holds annotations/instances_default.json; name the file with --train"):
        build_dataset("train", parse(*path))
    write_split(tmp_path, "train", "annotations/instances_part2.json", folder)
    with pytest.raises(InputError, match=r"no annotations of the val images; it holds annotations/instances_default"):
        build_dataset("val", parse(*path, "--eval"))


def test_several_annotation_files_of_one_split_are_refused(tmp_path, parse):
    for file in ("instances_default.json", "instances_Train.json"):
        write_split(tmp_path, "train", f"train/annotations/{file}", "train/images")
    with pytest.raises(InputError) as error:
        build_dataset("train", parse("--coco_path", tmp_path))
    assert str(error.value).endswith(
        "several files may be the annotations of the train images: train/annotations/instances_Train.json, "
        "train/annotations/instances_default.json; "
        "name the file with --train_annotations and its images with --train_images"
    )


def test_unknown_layouts_are_refused(tmp_path, parse):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "cells.json").write_text(json.dumps(cells()))
    with pytest.raises(InputError) as error:
        build_dataset("train", parse("--coco_path", tmp_path))
    assert str(error.value).endswith(
        "no annotations of the train images; it holds labels/cells.json; "
        "name the file with --train_annotations and its images with --train_images"
    )
