"""Segmentations in annotation files: usable ones become masks of samples and of the ground truth."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_api

from datasets import build_dataset
from datasets.run_lengths import runs
from datasets.segmentations import Segmentations, pack
from datasets.transforms import make_coco_transforms
from util.box_ops import masks_to_boxes
from util.errors import InputError

HEIGHT, WIDTH = 40, 60
SQUARE = [10.2, 5.5, 30.7, 5.5, 30.7, 25.3, 10.2, 25.3]
TRIANGLE = [40.0, 30.0, 55.5, 38.0, 45.0, 39.9]
TEXT = mask_api.merge(mask_api.frPyObjects([SQUARE], HEIGHT, WIDTH))
COUNTS = [HEIGHT * 10, HEIGHT * 5, HEIGHT * (WIDTH - 15)]


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [SQUARE, TRIANGLE],
        {"size": [HEIGHT, WIDTH], "counts": COUNTS},
        {"size": [HEIGHT, WIDTH], "counts": TEXT["counts"].decode()},
    ],
)
def test_masks_are_those_of_pycocotools(segmentation):
    codes = mask_api.frPyObjects(segmentation, HEIGHT, WIDTH) if not _is_text(segmentation) else segmentation
    expected = mask_api.decode(mask_api.merge(codes) if isinstance(codes, list) else codes)
    assert expected.any()
    kept = Segmentations.from_packed([pack(None), pack(segmentation)])
    assert np.array_equal(kept.masks([1], HEIGHT, WIDTH)[0], expected)
    assert not kept.masks([0], HEIGHT, WIDTH).any()
    assert np.array_equal(kept.select(np.array([1, 1])).masks([1], HEIGHT, WIDTH)[0], expected)


def _is_text(segmentation) -> bool:
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[]],
        [[1, 1, 5, 5]],  # two points
        [[1, 1, 5, 5, 3]],
        [[1, 1, 5, float("nan"), 3, 3]],
        "PPYo0",
        {"size": [HEIGHT, WIDTH], "counts": [1, 2, 3]},
        {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]},
        {"size": [HEIGHT, WIDTH], "counts": "no code"},
        {"size": [HEIGHT, WIDTH + 1], "counts": TEXT["counts"].decode()},
        {"size": [HEIGHT], "counts": COUNTS},
        {"size": [2**20, 2**20], "counts": [2**40]},
        {"counts": COUNTS},
    ],
)
def test_segmentations_that_are_not_usable_are_empty(segmentation):
    assert pack(segmentation)[0] == b""


LEAVES = st.none() | st.floats() | st.integers() | st.text()
KEYS = st.sampled_from(["size", "counts"])


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12))
def test_any_value_is_packed_or_empty(segmentation):
    content, size = pack(segmentation)
    if content and size == (0, 0):
        assert len(Segmentations.from_packed([(content, size)]).masks([0], 8, 8)) == 1


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200))
def test_runs_give_the_encoded_pixels(pixels):
    code = mask_api.encode(np.asfortranarray(np.array(pixels, dtype=np.uint8)[:, None]))
    lengths = runs(code["counts"].decode())
    values = [value for i, length in enumerate(lengths) for value in [i % 2] * length]
    assert values == pixels


def test_masks_follow_the_image(shapes, parse):
    """After augmentation, each mask is inside its box, and fills it unless it was cropped."""
    dataset = build_dataset("train", parse("--coco_path", shapes, "--masks"))
    dataset.transforms = make_coco_transforms("train", 96, 160)
    for index in range(len(dataset)):
        image, target = dataset[index]
        height, width = image.shape[1:]
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        assert target["masks"].dtype == torch.uint8
        visible = target["masks"].flatten(1).any(1)
        cx, cy, w, h = (target["boxes"][visible] * torch.tensor([width, height, width, height])).unbind(1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1)
        found = masks_to_boxes(target["masks"][visible]) + torch.tensor([0, 0, 1, 1])
        outside = torch.cat([corners[:, :2] - found[:, :2], found[:, 2:] - corners[:, 2:]], dim=1)
        assert (outside < 2).all()
        cropped = (corners < 1) | (corners > torch.tensor([width, height, width, height]) - 1)
        assert (outside > -3)[~cropped.any(1)].all()


def test_the_ground_truth_has_the_masks_of_the_file(shapes, parse):
    dataset = build_dataset("val", parse("--coco_path", shapes, "--masks"))
    truth, file = dataset.ground_truth(), dataset.coco
    assert len(truth.anns) == len(file.anns) > 0
    for image_id in file.imgs:
        ours, theirs = (coco.loadAnns(coco.getAnnIds(image_id)) for coco in (truth, file))
        for our, their in zip(ours, theirs, strict=True):
            assert our["category_id"] == their["category_id"]
            assert np.array_equal(truth.annToMask(our), file.annToMask(their))


def edited(shapes, tmp_path, change):
    """Copy the training annotations, change the first one, and return the flags for the copy."""
    path = shapes / "annotations" / "instances_train2017.json"
    data = json.loads(path.read_text())
    change(data["annotations"][0], data)
    copy = tmp_path / "train.json"
    copy.write_text(json.dumps(data))
    return ["--train_images", shapes / "images" / "train2017", "--train_annotations", copy]


def test_annotations_without_a_mask_are_left_out_and_counted(shapes, tmp_path, parse, capsys):
    flags = edited(shapes, tmp_path, lambda entry, _: entry.pop("segmentation"))
    everything = build_dataset("train", parse(*flags))
    with_masks = build_dataset("train", parse(*flags, "--masks"))
    assert len(everything.records.objects.labels) == len(with_masks.records.objects.labels) + 1
    assert "1 annotation without a usable segmentation left out" in capsys.readouterr().out


def test_run_length_codes_for_another_size_are_refused(shapes, tmp_path, parse):
    def change(entry, _):
        entry["segmentation"] = {"size": [3, 4], "counts": [6, 6]}

    flags = edited(shapes, tmp_path, change)
    with pytest.raises(InputError, match=r"train.json: annotation id 1: its segmentation is for 4×3 pixels, but the"):
        build_dataset("train", parse(*flags, "--masks"))


def test_masks_of_images_without_a_size_are_refused(shapes, tmp_path, parse):
    """Without a size, polygons of the ground truth cannot be turned into masks."""
    flags = edited(shapes, tmp_path, lambda _, data: [image.pop("width") for image in data["images"]])
    build_dataset("train", parse(*flags))
    with pytest.raises(InputError, match=r"train.json: annotation id 1: its image has no 'width' or no 'height'"):
        build_dataset("train", parse(*flags, "--masks"))
