"""Prediction from the command line: the detections, the gallery, and mistakes in the flags."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import urljoin
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from datasets.images import read_image
from scripts import predict
from scripts.detector import load_detector
from scripts.prediction import gallery
from tests.conftest import ROOT
from tests.predicting import CLASSES, DETECTIONS, NAMES, assert_same, page_data
from util.errors import InputError


def test_a_folder_gives_detections_and_pictures_of_its_images(run_predict, photos, tmp_path, scored_checkpoint):
    code, results, printed = run_predict(photos, "--threshold", 0.5)
    assert code == 0
    assert "5 of 5 inputs predicted" in printed
    assert list(results) == NAMES
    found = [result for of_image in results.values() for result in of_image]
    assert {(result["category_id"], result["category_name"]) for result in found} == set(CLASSES.values())
    assert min(result["score"] for result in found) < 0.05 < 0.5 < max(result["score"] for result in found)

    detector = load_detector(str(scored_checkpoint))
    (expected,) = detector([read_image(photos / "b.png").pixels])
    x1, y1, x2, y2 = expected["boxes"].unbind(1)
    boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], 1)
    ours = results["b.png"]
    assert len(ours) == DETECTIONS
    torch.testing.assert_close(torch.tensor([r["bbox"] for r in ours]), boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor([r["score"] for r in ours]), expected["scores"], atol=1e-5, rtol=0)

    for name in NAMES:
        file = name if name.endswith(".jpg") else f"{name}.jpg"
        picture, plain = (Image.open(tmp_path / "out" / folder / file) for folder in ("pictures", "images"))
        assert picture.size == plain.size == Image.open(photos / name).size
        assert (picture.tobytes() != plain.tobytes()) == any(r["score"] >= 0.5 for r in results[name])


@pytest.mark.parametrize("most_bytes", [gallery.MOST_BYTES, 0])
def test_the_gallery_shows_images_and_detections(most_bytes, run_predict, photos, tmp_path, monkeypatch):
    """The page contains the images, or refers to them if they have more than `MOST_BYTES`."""
    monkeypatch.setattr(gallery, "MOST_BYTES", most_bytes)
    _, results, _ = run_predict(photos, "--threshold", 0.6)
    data = page_data(tmp_path / "out")
    assert data["threshold"] == 0.6
    assert [entry["name"] for entry in data["entries"]] == NAMES
    for entry in data["entries"]:
        stored = tmp_path / "out" / "images" / (entry["name"] if ".jpg" in entry["name"] else f"{entry['name']}.jpg")
        with urlopen(urljoin(f"{(tmp_path / 'out').as_uri()}/", entry["file"])) as file:
            assert file.read() == stored.read_bytes()
        shown = [result for result in results[entry["name"]] if result["score"] >= 0.05]
        assert [box[1] for box in entry["boxes"]] == pytest.approx([r["score"] for r in shown], abs=1e-3)
        assert [CLASSES[box[0]][0] for box in entry["boxes"]] == [result["category_id"] for result in shown]
        assert all(0 <= x1 <= x2 <= entry["width"] for _, _, x1, _, x2, _ in entry["boxes"])
        assert all(0 <= y1 <= y2 <= entry["height"] for *_, y1, _, y2 in entry["boxes"])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>square" not in page
    assert data["classes"]["1"]["name"] == "<b>square</b>"
    assert not re.search(r"https?:|<link|src=\"|@import|url\((?!\$\{mask\})", page)  # needs no other site


def test_the_batch_size_changes_nothing(run_predict, photos):
    _, one, _ = run_predict(photos, "--batch_size", 1, "--num_workers", 1)
    _, many, _ = run_predict(photos, "--batch_size", 5, "--num_workers", 3)
    assert list(one) == list(many)
    for name in one:
        assert_same(many[name], one[name])


def test_amp_sets_the_precision_of_the_forward_pass(run_predict, photos):
    _, exact, _ = run_predict(photos)
    _, rounded, _ = run_predict(photos, "--amp", "bf16")
    scores = [[r["score"] for of_image in results.values() for r in of_image] for results in (exact, rounded)]
    differences = [abs(a - b) for a, b in zip(*scores, strict=True)]
    assert 1e-6 < max(differences) < 0.05


def test_min_size_and_max_size_set_the_size_of_images(run_predict, photos):
    _, usual, _ = run_predict(photos / "a.jpg")
    _, given, _ = run_predict(photos / "a.jpg", "--min_size", 64, "--max_size", 107)
    _, other, _ = run_predict(photos / "a.jpg", "--min_size", 96)
    assert given == usual != other


def test_max_detections_limits_the_detections_per_image(run_predict, photos):
    code, results, _ = run_predict(photos / "a.jpg", "--max_detections", 3)
    assert (code, len(results["a.jpg"])) == (0, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{tmp}/none"], "nothing to predict on"),
        (["{tmp}/text.jpg"], "none of 1 input could be read"),
        (["{tmp}", "--threshold", "30"], "--threshold 30.0: must be between 0 and 1"),
        (["{tmp}", "--every", "0"], "--every 0: must be at least 1"),
        (["{tmp}", "--checkpoint", "{tmp}/none.pth"], "none.pth: no such checkpoint"),
        (["{tmp}", "--device", "gpu"], "--device gpu: not a supported device"),
        (["{tmp}", "--annotations", "{tmp}/text.jpg"], "text.jpg: not a COCO file that lists images"),
        (["{photo}", "--output", "{tmp}/text.jpg"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, scored_checkpoint, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("{}")
    flags = [flag.format(tmp=tmp_path, photo=photos / "a.jpg") for flag in flags]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        predict.main(["--checkpoint", str(scored_checkpoint), "--output", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "detections.json").exists()


def test_the_command_warns_of_unusable_inputs_and_predicts_the_others(scored_checkpoint, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    flags = [photos / "*.jpg", tmp_path / "text.jpg", "--checkpoint", scored_checkpoint, "--output", tmp_path / "out"]
    process = subprocess.run(
        [sys.executable, "-m", "scripts.predict", *map(str, flags), "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 1
    assert "warning: text.jpg: cannot be decoded (not an image" in process.stdout
    assert not process.stderr
    assert {r["image_id"] for r in json.loads((tmp_path / "out" / "detections.json").read_text())} == {"a.jpg"}


@pytest.mark.parametrize("threshold", [0, 0.5, 1])
def test_the_number_of_boxes_is_reported(threshold, run_predict, photos):
    _, results, printed = run_predict(photos, "--threshold", threshold)
    scores = [result["score"] for of_image in results.values() for result in of_image]
    shown = sum(score >= threshold for score in scores)
    if threshold < 1:
        assert f"{shown} boxes score {threshold:g} or more" in printed
    else:
        assert f"no box scores 1 or more, the highest score is {max(scores):.2g}: lower --threshold" in printed


def test_a_single_box_is_reported_in_the_singular(run_predict, photos):
    _, results, _ = run_predict(photos / "a.jpg")
    best = results["a.jpg"][0]["score"]
    _, _, printed = run_predict(photos / "a.jpg", "--threshold", best - 1e-4)
    assert printed.startswith(f"1 box scores {best - 1e-4:g} or more\n")
