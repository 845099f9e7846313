"""Runs on faulty data: it is used, skipped with a warning, or refused in one line."""

import json
import shutil

import pytest
import torch
from PIL import Image

import main
from tests.conftest import flags, log_lines, train
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")


def test_an_image_that_cannot_be_decoded_ends_the_run_with_one_line(shapes, tmp_path, run_main):
    broken = tmp_path / "coco"
    shutil.copytree(shapes, broken)
    (broken / "images" / "train2017" / "000003.jpg").write_bytes(b"no image")
    done = run_main(*flags(broken, "--epochs", 1, "--num_workers", 1))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "000003.jpg (image id 3): cannot be decoded" in done.stderr
    assert "Traceback" not in done.stderr


def test_on_bad_image_skips_unreadable_images(shapes, tmp_path, capsys):
    broken = tmp_path / "coco"
    shutil.copytree(shapes, broken)
    (broken / "images" / "train2017" / "000003.jpg").write_bytes(b"no image")
    (broken / "images" / "val2017" / "000005.jpg").unlink()
    train(broken, tmp_path / "out", "--epochs", 1, "--on_bad_image", "skip")
    printed = capsys.readouterr().out
    assert "1 of 7 images of" in printed
    assert "warning: 1 image could not be read and was skipped: 000003.jpg (image id 3)" in printed
    assert "warning: 1 image could not be read and was skipped: 000005.jpg (image id 5)" in printed
    assert len(torch.load(tmp_path / "out" / "eval" / "latest.pth", weights_only=True)["params"]["imgIds"]) == 6


def test_data_with_other_classes_than_the_checkpoint_is_refused(shapes, trained, tmp_path):
    other = tmp_path / "coco"
    shutil.copytree(shapes, other)
    path = other / "annotations" / "instances_val2017.json"
    data = json.loads(path.read_text())
    for entry in (*data["categories"], *data["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] += 10
        if "name" in entry:
            entry["name"] = f"new {entry['name']}"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"category id 13 \(new triangle\) does not fit a model of 4 classes"):
        main.main(main.get_args_parser().parse_args(flags(other, "--eval", "--resume", trained / "checkpoint.pth")))


def without_boxes(shapes, tmp_path, *splits: str):
    """Return a copy of the data in which splits have no annotations."""
    empty = tmp_path / "coco"
    shutil.copytree(shapes, empty)
    for split in splits:
        path = empty / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    return empty


def test_training_data_without_boxes_is_refused(shapes, tmp_path):
    empty = without_boxes(shapes, tmp_path, "train")
    with pytest.raises(InputError, match=r"instances_train2017.json: no image has a box to learn from"):
        train(empty, tmp_path / "out", "--epochs", 1)


def test_training_data_with_boxes_only_in_unreadable_images_is_refused(shapes, tmp_path):
    """All of these images would be skipped, and nothing would be learned; one readable image is enough."""
    data = without_boxes(shapes, tmp_path, "train")
    path = data / "annotations" / "instances_train2017.json"
    annotations = json.loads((shapes / "annotations" / path.name).read_text())
    kept = {entry["id"] for entry in annotations["images"][:3]}
    boxes = [entry for entry in annotations["annotations"] if entry["image_id"] in kept]
    path.write_text(json.dumps(annotations | {"annotations": boxes}))
    missing, *unreadable = (data / "images" / "train2017" / entry["file_name"] for entry in annotations["images"][:3])
    missing.unlink()
    for file in unreadable:
        file.write_bytes(b"no image")
    skip = "--epochs", 1, "--on_bad_image", "skip"
    with pytest.raises(InputError, match=r"train2017.json: no image with boxes can be used .3 tried.*003"):
        train(data, tmp_path / "out", *skip)
    shutil.copy(shapes / "images" / "train2017" / unreadable[-1].name, unreadable[-1])
    train(data, tmp_path / "out", *skip)


def test_validation_data_without_boxes_gives_no_ap_and_no_best_checkpoint(shapes, tmp_path, capsys):
    empty = without_boxes(shapes, tmp_path, "val")
    train(empty, tmp_path / "out", "--epochs", 1)
    assert "instances_val2017.json has no boxes: AP cannot be measured, and no best" in capsys.readouterr().out
    (line,) = log_lines(tmp_path / "out")
    assert line["test_coco_eval_bbox"][0] == -1
    assert line["test_loss_bbox"] == 0
    assert line["test_class_error"] == 100
    assert not (tmp_path / "out" / "checkpoint_best.pth").exists()


def test_images_of_another_size_than_annotated_are_refused(shapes, tmp_path):
    other = tmp_path / "coco"
    shutil.copytree(shapes, other)
    Image.new("RGB", (300, 10)).save(other / "images" / "val2017" / "000001.jpg")
    with pytest.raises(InputError, match=r"000001.jpg \(image id 1\): is 300×10, but"):
        main.main(main.get_args_parser().parse_args(flags(other, "--eval")))
