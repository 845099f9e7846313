"""python -m scripts.predict from the command line to its files: any input, named mistakes, the model's detections."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

import pytest
import torch
from PIL import Image, ImageOps

from datasets.images import read_image
from datasets.shapes import draw_scene
from main import get_args_parser
from models import build_model
from scripts import predict
from scripts.detector import load_detector
from scripts.prediction import gallery
from scripts.prediction.inputs import bounded_batches, find_sources, prefetch, with_annotated_ids
from scripts.prediction.video import VideoReader, write_video
from tests.conftest import ROOT, TINY
from util.errors import InputError

CLASSES = {0: (70, "disc"), 1: ("sq", "<b>square</b>")}  # label: category id, name
DETECTIONS = 16  # an image: 8 queries × 2 classes
ORIENTATION = 0x0112
HOSTILE = "</script><img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with scores all over 0 to 1."""
    torch.manual_seed(1)
    args = get_args_parser().parse_args([*TINY, "--num_classes", str(len(CLASSES))])
    model, _, _ = build_model(args)
    torch.nn.init.normal_(model.class_embed.weight, std=0.9)
    model.class_embed.bias.data = torch.tensor([-1.5, 0])
    torch.nn.init.normal_(model.query_embed.weight, std=3)
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.2)
    ids, names = ({label: pair[i] for label, pair in CLASSES.items()} for i in (0, 1))
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": vars(args), "class_ids": ids, "class_names": names}, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of several shapes, formats and folders, for reading only."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("a.jpg", "b.png", f"sub/{HOSTILE}", "sub/größe 猫.webp", "sub/.hidden.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(root / name)
    scene(9).resize((40, 120)).save(root / "tall.bmp")
    (root / "notes.txt").write_text("not an image, not named like one")
    return root


NAMES = ["a.jpg", "b.png", "tall.bmp", "sub/größe 猫.webp", f"sub/{HOSTILE}"]


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Runs the tool: its exit code, results by image id, and what it printed."""

    def run(*flags: object):
        out = tmp_path / "out"
        code = predict.main(
            ["--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(out), *map(str, flags)]
        )
        results = {}
        for result in json.loads((out / "detections.json").read_text()):
            results.setdefault(result["image_id"], []).append(result)
        return code, results, capsys.readouterr().out

    return run


def scene(number: int) -> Image.Image:
    return draw_scene(random.Random(number))[0]


def page_data(out: Path) -> dict:
    page = (out / "index.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def assert_same(results, expected, tolerance=2e-3):
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours["category_id"] == theirs["category_id"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=tolerance)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=tolerance)


def test_a_folder(run, photos, tmp_path, checkpoint):
    code, results, printed = run(photos, "--threshold", 0.5)
    assert code == 0
    assert "5 of 5 inputs predicted" in printed
    assert list(results) == NAMES
    found = [result for of_image in results.values() for result in of_image]
    assert {(result["category_id"], result["category_name"]) for result in found} == set(CLASSES.values())
    assert min(result["score"] for result in found) < 0.05 < 0.5 < max(result["score"] for result in found)

    detector = load_detector(str(checkpoint))
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
def test_the_gallery(most_bytes, run, photos, tmp_path, monkeypatch):
    """With images within the page, and beside it."""
    monkeypatch.setattr(gallery, "MOST_BYTES", most_bytes)
    _, results, _ = run(photos, "--threshold", 0.6)
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
    assert not re.search(r"https?:|<link|src=\"|@import|url\(", page)  # nothing from elsewhere


def test_the_batch_size_changes_nothing(run, photos):
    _, one, _ = run(photos, "--batch_size", 1, "--num_workers", 1)
    _, many, _ = run(photos, "--batch_size", 5, "--num_workers", 3)
    assert list(one) == list(many)
    for name in one:
        assert_same(many[name], one[name])


def test_the_models_size_is_a_flag(run, photos):
    _, usual, _ = run(photos / "a.jpg")
    _, given, _ = run(photos / "a.jpg", "--min_size", 64, "--max_size", 107)
    _, other, _ = run(photos / "a.jpg", "--min_size", 96)
    assert given == usual != other


def test_unusable_inputs_are_named_and_skipped(run, photos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    scene(0).save(bad / "good.jpg")
    (bad / "cut.jpg").write_bytes((bad / "good.jpg").read_bytes()[:700])
    (bad / "text.jpg").write_text("hello")
    (bad / "empty.png").touch()
    (bad / "gone\n.jpg").symlink_to(bad / "nothing")
    code, results, printed = run(bad, tmp_path / "missing.jpg", tmp_path / "*.none", photos / "a.jpg")
    assert code == 1
    assert list(results) == ["good.jpg", "a.jpg"]
    lines = printed.splitlines()
    for name, problem in {
        "cut.jpg": "truncated",
        "text.jpg": "not an image",
        "empty.png": "not an image",
        r"gone\n.jpg": "No such file",
        "missing.jpg": "no such file or folder",
        "*.none": "no file matches",
    }.items():
        assert [line for line in lines if f"{name}:" in line and problem in line and "warning" in line], name
    assert lines[-1].startswith("not usable, or only in part: 6,")


def test_the_most_detections_per_image(run, photos):
    code, results, _ = run(photos / "a.jpg", "--max_detections", 3)
    assert (code, len(results["a.jpg"])) == (0, 3)


def test_ids_of_an_annotation_file_as_people_have_them(tmp_path):
    """Texts as ids, names with other separators, prefixes and cases, and a compressed file."""
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        scene(0).save(tmp_path / name)
    names = {"first": "data\\\\one.jpg", "second": "TWO.JPG", 3: "a/b/three.jpg"}
    images = [{"id": image_id, "file_name": name} for image_id, name in names.items()]
    path = tmp_path / "annotations.json"
    path.write_bytes(gzip.compress(json.dumps({"images": images}).encode()))
    reports = []
    sources = find_sources([str(tmp_path / "*.jpg")], reports.append)
    found = {source.path.name: source.image_id for source in with_annotated_ids(sources, str(path), reports.append)}
    assert found == {"one.jpg": "first", "two.jpg": "second", "three.jpg": 3}
    assert not reports


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{tmp}/none"], "nothing to predict on"),
        (["{tmp}/text.jpg"], "none of 1 input could be read"),
        (["{tmp}", "--threshold", "30"], "--threshold 30.0: must be between 0 and 1"),
        (["{tmp}", "--every", "0"], "--every 0: must be at least 1"),
        (["{tmp}", "--checkpoint", "{tmp}/none.pth"], "none.pth: no such checkpoint"),
        (["{tmp}", "--device", "gpu"], "--device gpu: not a device that is supported"),
        (["{tmp}", "--annotations", "{tmp}/text.jpg"], "text.jpg: not a COCO file that lists images"),
        (["{photo}", "--output", "{tmp}/text.jpg"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, checkpoint, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("{}")
    flags = [flag.format(tmp=tmp_path, photo=photos / "a.jpg") for flag in flags]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        predict.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "detections.json").exists()


def test_as_a_user_runs_it(checkpoint, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    flags = [photos / "*.jpg", tmp_path / "text.jpg", "--checkpoint", checkpoint, "--output", tmp_path / "out"]
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
def test_the_number_of_boxes_is_reported(threshold, run, photos):
    _, results, printed = run(photos, "--threshold", threshold)
    scores = [result["score"] for of_image in results.values() for result in of_image]
    shown = sum(score >= threshold for score in scores)
    if threshold < 1:
        assert f"{shown} boxes score {threshold:g} or more" in printed
    else:
        assert f"no box scores 1 or more, the highest score is {max(scores):.2g}: lower --threshold" in printed


def test_one_box(run, photos):
    _, results, _ = run(photos / "a.jpg")
    best = results["a.jpg"][0]["score"]
    _, _, printed = run(photos / "a.jpg", "--threshold", best - 1e-4)
    assert printed.startswith(f"1 box scores {best - 1e-4:g} or more\n")


def test_what_a_file_was_taken_for_is_said(run, tmp_path):
    scene(0).save(tmp_path / "a.gif", save_all=True, append_images=[scene(1)])
    scene(0).save(tmp_path / "b.jpg")
    code, results, printed = run(tmp_path)
    assert code == 0
    assert list(results) == ["a.gif", "b.jpg"]
    assert "1 image: several frames, of which the first is used (a.gif)" in printed


def test_huge_images(run, tmp_path):
    """JPEGs are decoded smaller, with boxes for their own size; others are refused by their header."""
    scene(3).resize((1600, 1200)).save(tmp_path / "huge.jpg", quality=95)
    scene(3).resize((1600, 1200)).save(tmp_path / "huge.png")
    _, whole, _ = run(tmp_path / "huge.jpg")
    code, reduced, printed = run(tmp_path, "--max_megapixels", 1)
    assert code == 1
    assert "huge.png: has 1,600×1,200 pixels, more than 1 megapixel: store it smaller, or raise --max_mega" in printed
    assert "1 image: more than 1 megapixel, decoded at 1/2 of its size (huge.jpg)" in printed
    assert_same(reduced["huge.jpg"], whole["huge.jpg"], tolerance=20)
    assert Image.open(tmp_path / "out" / "pictures" / "huge.jpg").size == (800, 600)
    (entry,) = page_data(tmp_path / "out")["entries"]
    assert (entry["width"], entry["height"]) == (1600, 1200)


def test_photos_are_turned_upright(run, tmp_path):
    upright = scene(3).resize((90, 60))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        stored = ImageOps.exif_transpose(inverse_of(upright, orientation))
        stored.save(tmp_path / f"{orientation}.png", exif=exif)
    _, results, _ = run(*(tmp_path / f"{orientation}.png" for orientation in range(1, 9)))
    for orientation in range(2, 9):
        assert_same(results[f"{orientation}.png"], results["1.png"])
    assert Image.open(tmp_path / "out" / "pictures" / "6.png.jpg").size == (90, 60)


def inverse_of(image: Image.Image, orientation: int) -> Image.Image:
    """The image with the orientation that undoes another: only the quarter turns are not their own inverse."""
    image = image.copy()
    image.getexif()[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
    return image


def test_ids_of_an_annotation_file(run, photos, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = scene(3).resize((90, 60))
    (tmp_path / "in").mkdir()
    stored.save(tmp_path / "in" / "turned.png", exif=exif)
    stored.save(tmp_path / "in" / "plain.png")
    files = {"in/turned.png": 5, "plain.png": 77, "a.jpg": 2**40, "never.jpg": 3}
    images = [{"id": image_id, "file_name": name} for name, image_id in files.items()]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    copy = tmp_path / "copy"
    copy.mkdir()
    stored.save(copy / "plain.png")
    code, results, printed = run(tmp_path / "in", photos, copy, "--annotations", tmp_path / "a.json")
    assert code == 1
    assert list(results) == [77, 5, 2**40]
    assert_same(results[5], results[77])  # as stored
    assert f"b.png: {tmp_path / 'a.json'} does not list it" in printed
    assert "is image 77 of" in printed


def test_files_of_one_name_keep_apart(run, tmp_path):
    for number, folder in enumerate(("x/1", "x/2", "y/1")):
        (tmp_path / folder).mkdir(parents=True)
        scene(number).save(tmp_path / folder / "same.jpg")
    first, second, third = (tmp_path / folder for folder in ("x/1", "x/2", "y/1"))
    _, results, _ = run(tmp_path / "x", third, first / "same.jpg")
    assert list(results) == ["1/same.jpg", "2/same.jpg", "same.jpg"]
    _, results, _ = run(first, second / "same.jpg", f"{tmp_path}/x/../y/1")
    assert list(results) == ["x/1/same.jpg", "x/2/same.jpg", "y/1/same.jpg"]
    pictures = [tmp_path / "out" / "pictures" / name for name in results]
    assert len({path.read_bytes() for path in pictures}) == 3


def test_results_are_not_inputs(run, tmp_path):
    scene(0).save(tmp_path / "a.jpg")
    for _ in range(2):
        _, results, _ = run(tmp_path)
        assert list(results) == ["a.jpg"]


def test_patterns(photos, tmp_path, monkeypatch):
    problems = []
    monkeypatch.chdir(photos)

    def names(*patterns):
        return [source.name for source in find_sources(patterns, problems.append)]

    assert names("**/*.webp", "*.jpg", "a.jpg") == ["größe 猫.webp", "a.jpg"]
    assert names("s*") == [name.removeprefix("sub/") for name in NAMES[3:]]
    (tmp_path / "[1].jpg").touch()  # a file may be named like a pattern
    assert names(f"{tmp_path}/[1].jpg") == ["[1].jpg"]
    assert not problems
    assert not names("", "a**b", f"{tmp_path}/none/*")
    assert len(problems) == 3


def test_large_items_wait():
    """Of those that weigh too much together, fewer are worked on, but always one."""
    weights, started, most = [3, 3, 3, 50, 1, 1, 1, 1, 1], [], []
    with ThreadPoolExecutor(4) as pool:
        for weight in prefetch(pool, lambda weight: started.append(weight) or weight, weights, 4, lambda w: w, 6):
            most.append(sum(started))
            started.remove(weight)
    assert max(most) <= 50
    assert sum(total > 6 for total in most) == 1
    batches = list(bounded_batches(weights, 4, lambda w: w, 6))
    assert batches == [[3, 3], [3], [50], [1, 1, 1, 1], [1]]


def test_prefetching_keeps_the_order_and_its_distance():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        squares = prefetch(pool, lambda number: number**2, items(), ahead=3)
        assert next(squares) == 0
        assert len(taken) == 4
        assert list(squares) == [number**2 for number in range(1, 20)]


class TestVideos:
    """Videos, where PyAV is installed."""

    @pytest.fixture(autouse=True)
    def _needs_av(self):
        pytest.importorskip("av")

    @pytest.fixture
    def clip(self, tmp_path) -> Path:
        """10 frames of 64 × 48 pixels that keep the same scene."""
        return self.write(tmp_path / "clip.mp4")

    def write(self, path: Path, frames: int = 10, size=(64, 48)) -> Path:
        rate = Fraction(30000, 1001)
        with write_video(path, rate, Fraction(1, 30000), size) as write:
            for number in range(frames):
                write(scene(number).resize(size), number / rate, 1 / rate)
        return path

    def test_a_clip(self, run, clip, photos, tmp_path):
        code, results, _ = run(clip, photos / "a.jpg", "--batch_size", 3)
        assert code == 0
        assert list(results) == [*(f"clip.mp4#{number:06}" for number in range(10)), "a.jpg"]
        assert all(len(found) == DETECTIONS for found in results.values())
        drawn = VideoReader(tmp_path / "out" / "pictures" / "clip.mp4")
        assert drawn.rate == Fraction(30000, 1001)
        assert [frame.pixels.shape for frame in drawn] == [(48, 64, 3)] * 10
        video, image = page_data(tmp_path / "out")["entries"]
        assert video == {"name": "clip.mp4", "file": "pictures/clip.mp4", "video": True, "boxes": []}
        assert image["boxes"]

    def test_every_third_frame(self, run, clip, tmp_path):
        _, all_frames, _ = run(clip)
        _, results, _ = run(clip, "--every", 3)
        assert list(results) == [f"clip.mp4#{number:06}" for number in (0, 3, 6, 9)]
        for name, found in results.items():
            assert_same(found, all_frames[name])
        drawn = list(VideoReader(tmp_path / "out" / "pictures" / "clip.mp4"))
        frame = Fraction(1001, 30000)
        assert [shown.time / frame for shown in drawn] == [0, 3, 6, 9]
        assert [shown.duration / frame for shown in drawn] == [3, 3, 3, 1]  # up to the clip's end

    def test_damaged_ones(self, run, tmp_path):
        size, folder = (65, 47), tmp_path / "in"
        folder.mkdir()
        whole = self.write(tmp_path / "whole.mp4", frames=60, size=size).read_bytes()
        (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (folder / "text.avi").write_text("hello")
        (folder / "image.mkv").touch()
        code, results, printed = run(folder)
        assert code == 1
        assert 5 < len(results) < 55
        assert f"cut.mp4: damaged, only {len(results)} of about 60 frames" in printed
        assert "text.avi: not a video" in printed
        assert "image.mkv: not a video" in printed
        drawn = VideoReader(tmp_path / "out" / "pictures" / "cut.mp4")
        assert {frame.pixels.shape for frame in drawn} == {(46, 64, 3)}

    def test_a_turned_one(self, tmp_path):
        av = pytest.importorskip("av")
        image = Image.new("RGB", (64, 32), "white")
        image.paste((255, 0, 0), (0, 0, 16, 32))  # red on the left: at the bottom after a quarter turn to the left
        with av.open(str(tmp_path / "turned.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV reads turned videos but cannot write them")
            stream.set_display_rotation(90)
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
            file.mux(stream.encode())
        (frame,) = VideoReader(tmp_path / "turned.mp4")
        assert frame.pixels.shape == (64, 32, 3)
        assert frame.pixels[60, 16, 1] < 80 < 200 < frame.pixels[4, 16, 1]

    def test_without_the_library(self, run, clip, photos, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        code, results, printed = run(clip, photos / "a.jpg")
        assert code == 1
        assert list(results) == ["a.jpg"]
        assert "clip.mp4: reading videos needs av: pip install av" in printed
