"""Runs on panoptic data: training, evaluation, prediction, and the flags of the data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets import build_dataset
from datasets.shapes import write_dataset
from models.postprocess_masks import PostProcessPanoptic
from scripts import check_data, predict
from tests.conftest import TINY, assert_same_end, log_lines
from tests.panoptic import edit
from util.errors import InputError


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Generate panoptic data that tests only read."""
    root = tmp_path_factory.mktemp("panoptic")
    write_dataset(root, num_train=8, num_val=5, panoptic=True)
    return root


def data_flags(root: Path) -> tuple[object, ...]:
    return ("--dataset_file", "coco_panoptic", "--coco_path", root, "--coco_panoptic_path", root, "--num_classes", 6)


def test_labels_without_a_class_are_not_predicted():
    outputs = {"pred_logits": torch.tensor([[[0.0, 9, 0], [9, 0, 0]]]), "pred_masks": torch.ones(1, 2, 4, 4)}
    (result,) = PostProcessPanoptic({0: True})(outputs, [(16, 16)])
    assert [segment["category_id"] for segment in result["segments_info"]] == [0]


def test_panoptic_models_train_resume_evaluate_and_predict(scenes, tmp_path, parse, capsys):
    flags = (*TINY, *data_flags(scenes), "--masks")
    main.main(parse(*flags, "--epochs", 2, "--output_dir", tmp_path / "once"))
    lines = log_lines(tmp_path / "once")
    for line in lines:
        assert len(line["test_coco_eval_masks"]) == len(line["test_coco_eval_bbox"]) == 12
        assert all(line[f"test_PQ_{group}"].keys() == {"pq", "sq", "rq", "n"} for group in ("all", "th", "st"))
    assert len(list((tmp_path / "once" / "panoptic_eval").glob("*.png"))) == 5
    for epochs in (1, 2):
        main.main(parse(*flags, "--epochs", epochs, "--output_dir", tmp_path / "twice", "--resume", "auto"))
    assert_same_end(tmp_path / "twice", tmp_path / "once")

    model = tmp_path / "once" / "checkpoint.pth"
    assert torch.load(model, weights_only=True)["class_isthing"] == {1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    capsys.readouterr()
    main.main(parse(*flags, "--eval", "--resume", model, "--output_dir", tmp_path / "eval"))
    assert "PQ by class" in capsys.readouterr().out
    assert {"panoptic_quality.png", "worst_panoptic", "panoptic_eval", "worst"} <= {
        path.name for path in (tmp_path / "eval").iterdir()
    }

    image = min((scenes / "images" / "val2017").iterdir())
    out = tmp_path / "predictions"
    places = ("--checkpoint", str(model), "--output", str(out), str(image))
    predict.main(["--device", "cpu", "--panoptic_threshold", "0", *places])
    (entry,) = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert entry["segments_info"]
    pixels = np.asarray(Image.open(out / "panoptic" / entry["file_name"])).astype(int)
    areas = {segment["id"]: segment["area"] for segment in entry["segments_info"]}
    assert dict(zip(*(part.tolist() for part in np.unique(pixels[..., 0], return_counts=True)), strict=True)) == areas
    assert Image.open(out / "pictures" / image.name).size == Image.open(image).size


def test_a_model_without_masks_trains_on_panoptic_data(scenes, tmp_path, parse, capsys):
    flags = (*TINY, *data_flags(scenes), "--epochs", 1)
    main.main(parse(*flags, "--coco_path", scenes / "images", "--val_images", scenes / "images" / "val2017",
                    "--train_images", scenes / "images" / "train2017", "--output_dir", tmp_path))  # fmt: skip
    assert "AP of boxes and masks is not measured: --coco_path" in capsys.readouterr().out
    (line,) = log_lines(tmp_path)
    assert line["test_loss_bbox"] > 0
    assert not [name for name in line if "coco" in name or "PQ" in name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coco_panoptic_path", "x"), "--coco_panoptic_path: panoptic data needs --dataset_file coco_panoptic"),
        (("--dataset_file", "coco_panoptic"), "name the folder with annotations/ and the PNG files with --coco"),
        (("--dataset_file", "coco_panoptic", "--coco_panoptic_path", "/x"), "no annotations/panoptic_train2017.json"),
        (("--dataset_file", "lvis"), "choose one of coco, coco_panoptic"),
    ],
)
def test_wrong_flags_of_panoptic_data_are_refused(flags, message, parse):
    with pytest.raises(InputError, match=message):
        main.main(parse(*TINY, *flags))


def test_the_folder_of_png_files_is_next_to_the_annotations_or_above(scenes, parse, tmp_path):
    """COCO's archive has it next to the annotation file."""
    dataset = build_dataset("train", parse(*data_flags(scenes)))
    assert dataset.segments_folder == scenes / "panoptic_train2017"
    (tmp_path / "annotations").mkdir()
    file = scenes / "annotations" / "panoptic_val2017.json"
    (tmp_path / "annotations" / file.name).write_bytes(file.read_bytes())
    named = (
        "--dataset_file",
        "coco_panoptic",
        "--coco_path",
        scenes,
        "--val_annotations",
        tmp_path / "annotations" / file.name,
    )
    with pytest.raises(InputError, match="no folder panoptic_val2017 with its PNG files"):
        build_dataset("val", parse(*named))
    (tmp_path / "annotations" / "panoptic_val2017").symlink_to(scenes / "panoptic_val2017")
    dataset = build_dataset("val", parse(*named))
    assert dataset.segments_folder == tmp_path / "annotations" / "panoptic_val2017"


def test_check_data_draws_segments_and_counts_unusable_ones(scenes, tmp_path, capsys):
    edited = tmp_path / "annotations" / "panoptic_train2017.json"
    edited.parent.mkdir()
    edited.write_bytes((scenes / "annotations" / "panoptic_train2017.json").read_bytes())
    (tmp_path / "panoptic_train2017").symlink_to(scenes / "panoptic_train2017")
    edit(edited, lambda d: d["annotations"][0]["segments_info"].append({"id": 77, "category_id": 1}))
    flags = map(str, (*data_flags(scenes), "--train_annotations", edited, "--output_dir", tmp_path / "out"))
    assert check_data.main(list(flags)) == 0
    printed = capsys.readouterr().out
    assert "1 image: 1 segment without pixels" in printed
    assert Image.open(tmp_path / "out" / "train.jpg").size[0] > 1000
