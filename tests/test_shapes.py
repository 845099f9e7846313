"""The generated data set is valid, varied and reproducible."""

import hashlib
import json

from datasets.shapes import CLASSES, overlap, write_dataset


def test_the_data_set_is_valid_coco_with_varied_images(tmp_path):
    write_dataset(tmp_path, num_train=60, num_val=20)
    digests = {}
    for split in ("train", "val"):
        data = json.loads((tmp_path / "annotations" / f"instances_{split}2017.json").read_text())
        files = sorted((tmp_path / "images" / f"{split}2017").iterdir())
        assert [file.name for file in files] == [image["file_name"] for image in data["images"]]
        digests[split] = {hashlib.sha256(file.read_bytes()).digest() for file in files}
        assert len(digests[split]) == len(files)
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        assert len(set(sizes.values())) > 10
        assert [category["name"] for category in data["categories"]] == list(CLASSES)
        assert {entry["category_id"] for entry in data["annotations"]} == {1, 2, 3}
        assert {entry["image_id"] for entry in data["annotations"]} < set(sizes)  # some images are empty
        for entry in data["annotations"]:
            x, y, width, height = entry["bbox"]
            assert x >= 0 and y >= 0
            assert x + width <= sizes[entry["image_id"]][0] + 0.01
            assert y + height <= sizes[entry["image_id"]][1] + 0.01
            assert 0 < entry["area"] <= width * height
    assert not digests["train"] & digests["val"]


def test_the_same_call_makes_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, num_train=3, num_val=1, seed=5)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_overlap_is_relative_to_the_smaller_box():
    square = [(0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0)]
    assert overlap(square, square) == 1
    assert overlap(square, [(x + 5, y) for x, y in square]) == 0.5
    assert overlap(square, [(x + 20, y) for x, y in square]) == 0
