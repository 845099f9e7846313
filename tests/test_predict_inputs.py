"""Inputs of prediction: files are found, read, named, and refused if they are not usable."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from scripts.prediction.inputs import bounded_batches, find_sources, prefetch, with_annotated_ids
from tests.predicting import NAMES, ORIENTATION, assert_same, page_data, scene


def test_unusable_inputs_are_named_and_skipped(run_predict, photos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    scene(0).save(bad / "good.jpg")
    (bad / "cut.jpg").write_bytes((bad / "good.jpg").read_bytes()[:700])
    (bad / "text.jpg").write_text("hello")
    (bad / "empty.png").touch()
    (bad / "gone\n.jpg").symlink_to(bad / "nothing")
    code, results, printed = run_predict(bad, tmp_path / "missing.jpg", tmp_path / "*.none", photos / "a.jpg")
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
    assert lines[-1].startswith("not usable, or only in part: 6 inputs,")


def test_files_of_several_frames_are_reported(run_predict, tmp_path):
    scene(0).save(tmp_path / "a.gif", save_all=True, append_images=[scene(1)])
    scene(0).save(tmp_path / "b.jpg")
    code, results, printed = run_predict(tmp_path)
    assert code == 0
    assert list(results) == ["a.gif", "b.jpg"]
    assert "1 image: several frames, of which the first is used (a.gif)" in printed


def test_huge_jpegs_are_reduced_and_other_huge_images_are_refused(run_predict, tmp_path):
    """Boxes of reduced JPEGs have the scale of the file. Other formats are refused before they are decoded."""
    scene(3).resize((1600, 1200)).save(tmp_path / "huge.jpg", quality=95)
    scene(3).resize((1600, 1200)).save(tmp_path / "huge.png")
    _, whole, _ = run_predict(tmp_path / "huge.jpg")
    code, reduced, printed = run_predict(tmp_path, "--max_megapixels", 1)
    assert code == 1
    assert "huge.png: has 1,600×1,200 pixels, more than 1 megapixel: store it smaller, or raise --max_mega" in printed
    assert "1 image: more than 1 megapixel, decoded at 1/2 of its size (huge.jpg)" in printed
    assert_same(reduced["huge.jpg"], whole["huge.jpg"], tolerance=20)
    assert Image.open(tmp_path / "out" / "pictures" / "huge.jpg").size == (800, 600)
    (entry,) = page_data(tmp_path / "out")["entries"]
    assert (entry["width"], entry["height"]) == (1600, 1200)


def test_photos_are_turned_upright(run_predict, tmp_path):
    upright = scene(3).resize((90, 60))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        stored = ImageOps.exif_transpose(inverse_of(upright, orientation))
        stored.save(tmp_path / f"{orientation}.png", exif=exif)
    _, results, _ = run_predict(*(tmp_path / f"{orientation}.png" for orientation in range(1, 9)))
    for orientation in range(2, 9):
        assert_same(results[f"{orientation}.png"], results["1.png"])
    assert Image.open(tmp_path / "out" / "pictures" / "6.png.jpg").size == (90, 60)


def inverse_of(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image with the inverse of an EXIF orientation; all except quarter turns are their own inverse."""
    image = image.copy()
    image.getexif()[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
    return image


def test_results_have_the_ids_of_an_annotation_file(run_predict, photos, tmp_path):
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
    code, results, printed = run_predict(tmp_path / "in", photos, copy, "--annotations", tmp_path / "a.json")
    assert code == 1
    assert list(results) == [77, 5, 2**40]
    assert_same(results[5], results[77])  # images of annotation files are not turned upright
    assert f"b.png: {tmp_path / 'a.json'} does not list it" in printed
    assert "is image 77 of" in printed


def test_ids_of_unusual_annotation_files_are_found(tmp_path):
    """Ids may be texts, names may have other separators, prefixes and cases, and the file may be compressed."""
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


def test_files_of_equal_names_have_separate_results(run_predict, tmp_path):
    for number, folder in enumerate(("x/1", "x/2", "y/1")):
        (tmp_path / folder).mkdir(parents=True)
        scene(number).save(tmp_path / folder / "same.jpg")
    first, second, third = (tmp_path / folder for folder in ("x/1", "x/2", "y/1"))
    _, results, _ = run_predict(tmp_path / "x", third, first / "same.jpg")
    assert list(results) == ["1/same.jpg", "2/same.jpg", "same.jpg"]
    _, results, _ = run_predict(first, second / "same.jpg", f"{tmp_path}/x/../y/1")
    assert list(results) == ["x/1/same.jpg", "x/2/same.jpg", "y/1/same.jpg"]
    pictures = [tmp_path / "out" / "pictures" / name for name in results]
    assert len({path.read_bytes() for path in pictures}) == 3


def test_results_of_an_earlier_call_are_not_inputs(run_predict, tmp_path):
    scene(0).save(tmp_path / "a.jpg")
    for _ in range(2):
        _, results, _ = run_predict(tmp_path)
        assert list(results) == ["a.jpg"]


def test_patterns_find_files(photos, tmp_path, monkeypatch):
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


def test_prefetching_and_batches_limit_the_total_weight_of_items():
    """An item that exceeds the limit is processed alone."""
    weights, started, most = [3, 3, 3, 50, 1, 1, 1, 1, 1], [], []
    with ThreadPoolExecutor(4) as pool:
        for weight in prefetch(pool, lambda weight: started.append(weight) or weight, weights, 4, lambda w: w, 6):
            most.append(sum(started))
            started.remove(weight)
    assert max(most) <= 50
    assert sum(total > 6 for total in most) == 1
    batches = list(bounded_batches(weights, 4, lambda w: w, 6))
    assert batches == [[3, 3], [3], [50], [1, 1, 1, 1], [1]]


def test_prefetching_keeps_the_order_and_takes_few_items_ahead():
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
