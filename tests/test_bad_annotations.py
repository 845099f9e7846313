"""Annotation files with mistakes of any kind: usable samples, counted omissions, or an error that names the place."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import get_coco_api_from_dataset
from datasets.annotations import read_annotations
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.transforms import make_coco_transforms
from util.errors import InputError
from util.nested_tensor import collate_fn

SIZES = {"a.jpg": (40, 30), "sub/b.png": (20, 50), "pixel.png": (1, 1)}
TRAIN, VAL = (make_coco_transforms(split, 24, 40) for split in ("train", "val"))


def plain() -> dict:
    """Return a data set without mistakes."""
    images = [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(SIZES.items(), 1)]
    boxes = [(1, [1, 2, 10, 5]), (1, [0.5, 3, 8, 9.5]), (2, [0, 0, 20, 50]), (3, [0, 0, 1, 1])]
    annotations = [
        {"id": i, "image_id": image_id, "category_id": i % 2 * 3, "bbox": box, "area": 44.5, "iscrowd": i // 4}
        | {"segmentation": [[1, 2, 3, 4, 5, 6]]}
        for i, (image_id, box) in enumerate(boxes, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "cat"}, {"id": 3}]}


def with_entry(kind: str, **changes) -> dict:
    """Return the plain data set with changes to the first entry of a list."""
    data = plain()
    data[kind][0] |= changes
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    (folder / "sub").mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / name)
    return folder


def write(path: Path, data: bytes) -> None:
    """Write a new file, since overwriting one makes file systems wait for the disk, here thousands of times."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def build(folder, data, transforms=VAL, **options) -> CocoDetection:
    path = folder / "instances.json"
    write(path, json.dumps(data).encode())
    return CocoDetection(folder, path, transforms, **options)


numbers = st.one_of(
    st.integers(-60, 60),
    st.floats(-60, 60),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 1e300, -1e300, 3.5e38, 1e-40, 65_536]),
)
pixels = st.one_of(st.integers(-60, 60), st.floats(-60, 60), st.floats(-1e9, 1e9), st.sampled_from([0, 1e-40, 1e9]))
names = st.one_of(
    st.text(st.characters(codec=None), max_size=8),
    st.sampled_from(["a.jpg", "./a.jpg", "../a.jpg", "sub/../a.jpg", "/etc/passwd", "sub\\b.png", "sub", "x" * 5000]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, names, st.lists(numbers, min_size=4, max_size=4)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
KEYS = ("id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "is_crowd", "name")


@st.composite
def mistaken(draw) -> object:
    """Draw the plain data set with up to four mistakes."""
    data = plain()
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
        entries = data.get(kind)
        change = draw(st.sampled_from(["value", "value", "box", "box", "box", "without", "twice", "entry", "list"]))
        if change == "list" or not isinstance(entries, list) or not entries:
            data[kind] = draw(values | st.just([]))
            continue
        number = draw(st.integers(0, len(entries) - 1))
        entry = entries[number]
        if change == "twice":
            entries.append(copy.deepcopy(entry))
        elif change == "entry" or not isinstance(entry, dict):
            entries[number] = draw(values)
        elif change == "without":
            entry.pop(draw(st.sampled_from(KEYS)), None)
        elif change == "box":
            entry["bbox"] = draw(st.lists(pixels, min_size=4, max_size=4))
        else:
            entry[draw(st.sampled_from([*entry, *KEYS]))] = draw(values)
    return data


def assert_usable(dataset: CocoDetection, image: torch.Tensor, target: dict) -> None:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert image.shape[1:] == tuple(target["size"].tolist())
    assert 0 < min(image.shape[1:]) <= max(image.shape[1:]) <= 80
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert ((target["boxes"] >= 0) & (target["boxes"] <= 1 + 1e-6)).all()  # up to rounding
    assert (target["boxes"][:, 2:] > 0).all()
    assert target["area"].isfinite().all()
    assert ((target["labels"] >= 0) & (target["labels"] < dataset.classes.num_labels)).all()


def evaluate(dataset: CocoDetection) -> None:
    """Score a few predictions for every image, some of which are exactly right."""
    evaluator = CocoEvaluator(get_coco_api_from_dataset(dataset), ["bbox"])
    labels = torch.arange(4)
    for image_id in dataset.ids:
        boxes = torch.tensor([[1.0, 2, 11, 7]]).expand(4, 4)
        evaluator.update({image_id: {"scores": torch.full((4,), 0.5), "labels": labels, "boxes": boxes}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    assert all(-1 <= value <= 1 for value in evaluator.coco_eval["bbox"].stats)


def check(folder, data) -> None:
    """Do with `data` all that a run does with a data set."""
    try:
        dataset = build(folder, data)
        samples = list(dataset)
        summary = dataset.summary()
    except InputError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        return
    for image, target in samples:
        assert_usable(dataset, image, target)
    kept = len(dataset.coco.anns)  # without those of unlisted images, and those without a box
    assert summary.boxes + summary.crowds + summary.dropped == kept <= len(data["annotations"])
    assert summary.images == len(samples) == len(data["images"])
    if all(entry.get("width") and entry.get("height") for entry in data["images"]):
        assert summary.boxes == sum(len(target["labels"]) for _, target in samples)
        assert summary.empty_images == sum(len(target["labels"]) == 0 for _, target in samples)
        assert summary.classes == len({label for _, target in samples for label in target["labels"].tolist()})
    batch, _ = collate_fn(samples)
    assert batch.tensors.shape[0] == len(samples)
    dataset.transforms = TRAIN
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for image, target in dataset:
            assert_usable(dataset, image, target)
    evaluate(dataset)


@settings(max_examples=250)
@given(data=mistaken())
def test_annotations_with_mistakes(data, folder):
    check(folder, data)


@pytest.mark.slow
@settings(max_examples=4000)
@given(data=mistaken())
def test_annotations_with_many_mistakes(data, folder):
    check(folder, data)


@settings(max_examples=50)
@given(data=values)
def test_files_with_any_json(data, folder):
    with pytest.raises(InputError, match=r"instances.json: not (JSON|a COCO instance file)"):
        build(folder, data)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("images", {"id": 2**63}, "image id 9223372036854775808: its id must be a 64-bit integer"),
        ("images", {"id": "one\ntwo"}, r"image number 0: its id must be a 64-bit integer, not 'one\\ntwo'"),
        ("images", {"file_name": ""}, "image id 1: 'file_name' must be the image's file, not ''"),
        ("images", {"file_name": "."}, "image id 1: 'file_name' must be the image's file"),
        ("images", {"file_name": "a\0.jpg"}, r"image id 1: 'file_name' must be the image's file, not 'a\\x00.jpg'"),
        ("images", {"file_name": "\ud800"}, r"image id 1: 'file_name' must be the image's file, not '\\ud800'"),
        ("images", {"file_name": "../secret.jpg"}, "'../secret.jpg' leaves the image folder .* and no file in it has"),
        ("images", {"file_name": "sub/../../secret.jpg"}, "leaves the image folder"),
        ("images", {"file_name": "/etc/passwd"}, "'/etc/passwd' leaves the image folder"),
        ("images", {"file_name": "sub"}, "1 of 3 images of .* is missing: sub"),
        ("images", {"file_name": "x" * 300 + "/absent.jpg"}, "1 of 3 images of .* is missing: xxx"),
        ("images", {"width": 10**400}, "image id 1: 'width' must be a positive number of pixels, not 1000"),
        ("images", {"height": -3}, "image id 1: 'height' must be a positive number of pixels, not -3"),
        (
            "categories",
            {"id": "a\nb"},
            r"category number 0: its id must be an integer or text of one line, not 'a\\nb'",
        ),
        ("categories", {"name": ["cat"]}, r"category id 0: 'name' must be text of one line, not \['cat'\]"),
        ("categories", {"name": "cat\ndog"}, r"category id 0: 'name' must be text of one line, not 'cat\\ndog'"),
        ("annotations", {"id": -(2**63) - 1}, "its id must be a 64-bit integer"),
        ("annotations", {"is_crowd": 1}, "annotation id 1: 'is_crowd' is not a key of COCO's format: write 'iscrowd'"),
        ("annotations", {"iscrowd": "no"}, "annotation id 1: 'iscrowd' must be 0 or 1, not 'no'"),
        ("annotations", {"iscrowd": 2}, "annotation id 1: 'iscrowd' must be 0 or 1, not 2"),
        ("annotations", {"area": -1}, "annotation id 1: 'area' must be a number of pixels, not -1; if it is left out"),
        ("annotations", {"area": float("nan")}, "annotation id 1: 'area' must be a number of pixels, not nan"),
        ("annotations", {"bbox": [0, 0, 10**400, 1]}, "annotation id 1: 'bbox' must be four finite numbers"),
        ("annotations", {"bbox": [-1e300, 0, 1e300, 1]}, "annotation id 1: 'bbox' must be four finite numbers"),
        ("annotations", {"bbox": [True, 0, 1, 1]}, "annotation id 1: 'bbox' must be four finite numbers"),
    ],
)
def test_the_error_names_the_mistake(kind, changes, message, folder):
    with pytest.raises(InputError, match=message) as error:
        build(folder, with_entry(kind, **changes))
    assert "\n" not in str(error.value)


def test_harmless_mistakes(folder):
    """Entries that only other tasks need are ignored."""
    data = with_entry("annotations", segmentation={"counts": "no code", "size": 3}, ignore=[], keypoints=None)
    data["categories"][0] |= {"name": 7, "supercategory": []}
    data["info"] = 1
    dataset = build(folder, data)
    assert dataset.classes.names == {0: "7", 3: "3"}
    assert dataset.summary().boxes == 3
    evaluate(dataset)


def test_a_box_of_negative_width_has_no_area(folder):
    dataset = build(folder, with_entry("annotations", bbox=[5, 5, -3, 4], area=None))
    assert dataset.coco.anns[1]["area"] == 0
    assert dataset.summary().dropped == 1


def test_a_box_that_begins_far_outside_keeps_its_visible_part(folder):
    dataset = build(folder, with_entry("annotations", bbox=[-9e8, -20, 9e8 + 10, 35]))
    assert dataset[0][1]["boxes"][0].tolist() == pytest.approx([5 / 40, 7.5 / 30, 10 / 40, 15 / 30])


def test_entries_that_are_left_out_are_checked_and_counted(folder):
    path = folder / "difficult.json"
    path.write_text(json.dumps(with_entry("annotations", difficult=1)))
    coco, _ = read_annotations(path, remove_difficult=True)
    assert len(coco.anns) == 3
    path.write_text(json.dumps(with_entry("annotations", difficult=1, bbox=[1, 2])))
    with pytest.raises(InputError, match="annotation id 1: 'bbox'"):
        read_annotations(path, remove_difficult=True)


def test_symbolic_links(tmp_path):
    """Linked folders are common; images that are circular or broken links are missing."""
    store, folder = tmp_path / "store", tmp_path / "images"
    (store / "sub").mkdir(parents=True)
    for name, size in SIZES.items():
        Image.new("RGB", size).save(store / name)
    folder.symlink_to(store)
    (store / "sub" / "up").symlink_to(store)
    (store / "loop").symlink_to(store / "loop")
    assert len(build(folder, plain())) == 3
    for number, target in enumerate([store / "loop", store / "nowhere"]):
        (store / f"{number}.jpg").symlink_to(target)
        with pytest.raises(InputError, match=f"1 of 3 images of .* is missing: {number}.jpg"):
            build(folder, with_entry("images", file_name=f"{number}.jpg"))


def test_annotations_without_an_id_get_unused_ids(folder):
    data = plain()
    for entry, annotation_id in zip(data["annotations"], (-1, None, 0, 5), strict=True):
        entry["id"] = annotation_id
    random.Random(0).shuffle(data["annotations"])
    assert sorted(build(folder, data).coco.anns) == [-1, 5, 6, 7]
