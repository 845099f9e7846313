"""The report on a data set before a training, and its pages of pictures."""

import json
import shutil

import pytest
from PIL import Image

from datasets.shapes import write_dataset
from scripts.check_data import main
from util.errors import InputError


@pytest.fixture
def check(shapes, tmp_path, capsys):
    def check(change=lambda root, data: None, *flags):
        """Return the report on a copy of the generated data after `change`, and the exit code."""
        root = tmp_path / "data"
        shutil.copytree(shapes, root, dirs_exist_ok=True)
        files = {split: root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
        data = {split: json.loads(path.read_text()) for split, path in files.items()}
        change(root, data)
        for split, path in files.items():
            path.write_text(json.dumps(data[split]))
        code = main(["--device", "cpu", "--coco_path", str(root), *map(str, flags)])
        return capsys.readouterr().out, code

    return check


def test_a_good_data_set(tmp_path, capsys):
    write_dataset(tmp_path, num_train=40, num_val=12)
    assert main(["--device", "cpu", "--coco_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    data = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
    circles = [entry for entry in data["annotations"] if entry["category_id"] == 1]
    images = len({entry["image_id"] for entry in circles})
    assert f"   1  circle             {len(circles)}       {images} " in report
    assert f"targets   {len(data['annotations'])}: 1 to 3 per image" in report
    assert "nothing suspicious" in report
    for split in ("train", "val"):
        assert Image.open(tmp_path / "out" / f"{split}.jpg").size == (4 * 408 + 8, 3 * 308 + 8)


def test_boxes_that_are_left_out_and_the_reasons(check):
    def change(root, data):
        boxes = ([0, 0, 0, 9], [0, 0, 9, -1], [900, 0, 9, 9], [0, 0, 9, 9])
        image_id = data["train"]["images"][0]["id"]
        data["train"]["annotations"] += [
            {"image_id": image_id, "category_id": 1, "bbox": box, "iscrowd": int(box == boxes[-1])} for box in boxes
        ]

    report, _ = check(change)
    assert "1 crowd region, 2 boxes without width or height, 1 box outside of its image" in report


def test_padding(check):
    report, _ = check(lambda root, data: None, "--batch_size", 1)
    assert "in batches of 1, 0 % of the images are padded, 0 % of the pixels" in report
    report, _ = check(lambda root, data: None, "--batch_size", 4)
    assert "in batches of 4, 0 %" not in report


def test_suspicious_data(check):
    def change(root, data):
        train, val = (root / "images" / f"{split}2017" for split in ("train", "val"))
        names = [entry["file_name"] for entry in data["train"]["images"]]
        (train / names[0]).write_bytes(b"no image")
        (train / names[1]).unlink()
        shutil.copy(train / names[2], val / data["val"]["images"][0]["file_name"])
        shutil.copy(train / names[3], train / names[4])
        for split in ("train", "val"):
            for entry in data[split]["images"]:
                del entry["width"], entry["height"]
        data["train"]["categories"].append({"id": 4, "name": "star"})
        data["val"]["categories"].append({"id": 9, "name": "moon"})
        data["val"]["annotations"][0]["category_id"] = 9

    report, code = check(change, "--num_queries", 1)
    assert code == 1
    assert "2 train images cannot be used" in report
    assert "(image id 1): cannot be decoded" in report
    assert "images have more boxes than the model's 1 query can find: pass --num_queries 2 or more" in report
    assert "1 class has no box to learn from: star" in report
    assert "classes have fewer than 10 boxes to learn from: circle (" in report
    assert "1 class of the val split is not in the training file: moon" in report
    assert "1 image is in both splits, so that AP is too high: 000003.jpg" in report
    assert "1 training image is a copy of another" in report


@pytest.mark.parametrize(("model", "queries"), [("conditional_detr", 300), ("detr", 100)])
def test_queries_and_classes_are_those_of_the_model(model, queries, check):
    def change(root, data):
        objects = data["train"]["annotations"]
        objects += [{**objects[0], "id": 1_000 + i} for i in range(350 if model == "conditional_detr" else 150)]
        objects[-1]["category_id"] = 3

    report, _ = check(change, "--model", model, "--max_detections", 1_000)
    assert f"train: 1 image has more boxes than the model's {queries} queries can find" in report
    assert "does not fit" not in report
    report, _ = check(change, "--model", model, "--num_queries", 400, "--num_classes", 3)
    assert "queries can find" not in report
    assert "category id 3 (triangle) does not fit a model of 3 classes; --num_classes 4 or more is needed" in report


def test_images_that_are_read_only_in_part(check):
    """The report names images with unused frames, and those with more than 8 bits per channel."""

    def change(root, data):
        train = root / "images" / "train2017"
        names = [entry["file_name"] for entry in data["train"]["images"]]
        with Image.open(train / names[0]) as image:
            image.save(train / names[0], "GIF", save_all=True, append_images=[image.rotate(90)])
        for name in names[1:3]:
            with Image.open(train / name) as image:
                grey = image.convert("L").convert("I").point(lambda value: value * 16).convert("I;16")
            grey.save(train / name, "PNG")

    report, code = check(change)
    assert code == 0
    assert "train: 1 image: several frames, of which the first is used (000001.jpg)" in report
    assert "2 images: more than 8 bits per channel; 4,095 is taken as white (000002.jpg, 000003.jpg)" in report


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        main(["--device", "cpu", "--coco_path", str(tmp_path / "nowhere")])
