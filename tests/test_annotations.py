"""Annotation files and images: values that are filled in, entries that are left out, and errors of one line."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from datasets import build_dataset, build_loader, get_coco_api_from_dataset
from datasets.annotations import read_annotations
from datasets.coco import CocoDetection
from util.errors import InputError


def plain() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 20},
        ],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 10, 5], "area": 44.5, "iscrowd": 0}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
    }


def write_annotations(folder, data) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "annotations" / "instances_val2017.json").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """A COCO folder with a val split of two images."""
    (tmp_path / "annotations").mkdir()
    images = tmp_path / "images" / "val2017"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(images / "a.jpg")
    Image.new("L", (20, 20)).save(images / "sub" / "b.png")
    write_annotations(tmp_path, plain())
    return tmp_path


@pytest.fixture
def load(parse, folder):
    def load(data=None, *flags) -> CocoDetection:
        if data is not None:
            write_annotations(folder, data)
        return build_dataset("val", parse("--coco_path", folder, *flags))

    return load


def with_annotation(**changes) -> dict:
    data = plain()
    data["annotations"][0] |= changes
    data["annotations"][0] = {key: value for key, value in data["annotations"][0].items() if value != "missing"}
    return data


def test_samples_in_the_order_of_ids(load):
    dataset = load()
    assert dataset.ids == [3, 7]
    image, target = dataset[0]
    assert image.shape == (3, 800, 800)
    assert target["boxes"].shape == (0, 4)
    image, target = dataset[1]
    assert image.shape == (3, 800, 1066)
    assert target["labels"].tolist() == [2]
    assert target["boxes"][0].tolist() == pytest.approx([6 / 40, 4.5 / 30, 10 / 40, 5 / 30])
    assert target["orig_size"].tolist() == [30, 40]
    assert target["size"].tolist() == [800, 1066]
    assert dataset.classes.num_labels == 6
    assert dataset.classes.names == {2: "cat", 5: "dog"}


def test_detrs_folder_layout_works_too(folder, load):
    (folder / "images" / "val2017").rename(folder / "val2017")
    assert len(load()) == 2


def test_missing_area_and_iscrowd_are_filled_in(load):
    dataset = load(with_annotation(area="missing", iscrowd="missing"))
    (entry,) = get_coco_api_from_dataset(dataset).loadAnns([1])
    assert (entry["area"], entry["iscrowd"]) == (50, 0)
    assert dataset[1][1]["area"].item() > 0


@pytest.mark.parametrize("missing", ["missing", 0])
def test_annotations_get_an_id_that_pycocotools_can_use(missing, load):
    dataset = load(with_annotation(id=missing))
    assert list(dataset.coco.anns) == [1]


def test_crowds_and_boxes_without_area_are_counted_and_left_out(load):
    data = plain()
    data["annotations"] += [
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [5, 5, 0, 9]},
        {"id": 4, "image_id": 7, "category_id": 2, "bbox": [41, 5, 5, 9]},
    ]
    dataset = load(data)
    assert len(dataset[1][1]["labels"]) == 1
    assert len(dataset.coco.anns) == 4
    assert str(dataset.summary()) == (
        "2 images (1 without boxes), 1 box of 1 class; left out: 1 crowd region, 2 boxes without area"
    )


def test_strings_as_annotation_ids(load):
    data = with_annotation(id="a1")
    data["annotations"] += [data["annotations"][0] | {"id": text} for text in ("a1", "2")]
    assert list(load(data).coco.anns) == [3, 4, 2]


@pytest.mark.parametrize(
    "counts", [[125, 2, 28, 2, 1043], mask.encode(np.pad(np.ones((2, 2), np.uint8, "F"), ((5, 23), (4, 34))))["counts"]]
)
def test_boxes_of_run_length_encodings(counts, load):
    data = with_annotation(bbox="missing", area="missing")
    data["annotations"][0]["segmentation"] = {
        "size": [30, 40],
        "counts": counts if isinstance(counts, list) else counts.decode(),
    }
    (entry,) = load(data).coco.anns.values()
    assert (entry["bbox"], entry["area"]) == ([4, 5, 2, 2], 4)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [30, 40], "counts": [1200]},  # an empty mask
        {"size": [30, 40], "counts": [125, 2, 28]},  # fewer pixels than the image
        {"size": [30, 40], "counts": mask.encode(np.ones((2, 2), np.uint8, "F"))["counts"].decode()},
        {"size": [30, 40], "counts": [-1, 1201]},
        {"size": [0, 0], "counts": "0"},
        {"size": [30, 40], "counts": "oooo"},  # a number that does not end
        {"size": [30], "counts": "1"},
        {"counts": "1"},
    ],
)
def test_unusable_run_length_encodings(segmentation, load, capsys):
    data = with_annotation(bbox="missing")
    data["annotations"][0]["segmentation"] = segmentation
    assert len(load(data).coco.anns) == 0
    assert "1 annotation without a box or a usable segmentation: left out" in capsys.readouterr().out


@pytest.mark.parametrize("nothing", [None, [], [[]]])
def test_areas_in_another_unit(nothing, load, capsys):
    """Small areas raise a warning, except for objects with a segmentation, which may fill a hundredth of their box."""
    load(with_annotation(area=0.04, segmentation=nothing))
    assert "json: 1 box has no segmentation and an 'area' below 1% of width × height: AP of" in capsys.readouterr().out
    load(with_annotation(area=0.04, segmentation=[[1, 2, 11, 7, 1, 2]]))
    load(with_annotation(area=0.5, segmentation=nothing))
    assert "'area'" not in capsys.readouterr().out


def test_remove_difficult(load):
    data = with_annotation(difficult=1)
    assert load(data).summary().boxes == 1
    assert load(data, "--remove_difficult").summary().boxes == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "instances_val2017.json: not JSON"),
        ("[1]", "not a COCO instance file: it has no list 'images'"),
        ({"images": [], "annotations": []}, "it has no list 'categories'"),
        (
            {key: plain()[key] for key in ("images", "categories")},
            "lists images without annotations, like COCO's image_info files, which are only for --eval --image",
        ),
        ({"images": [], "annotations": [], "categories": []}, "lists no images"),
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, "image id 1: 'file_name'"),
        ({"images": [3], "annotations": [], "categories": []}, "image number 0: not a JSON object but 3"),
        (plain() | {"images": plain()["images"] * 2}, "image id 7: the id is used twice"),
        (
            plain() | {"categories": [{"id": 2.5, "name": "cat"}]},
            "category number 0: its id must be an integer or text of one line, not 2.5",
        ),
        (plain() | {"categories": [{"id": "2", "name": "cat"}]}, "its category_id 2 is not among the file's category"),
        (with_annotation(bbox=[1, 2, float("nan"), 3]), "annotation id 1: 'bbox' must be four finite numbers"),
        (with_annotation(bbox=[1, 2, 3]), "annotation id 1: 'bbox' must be four finite numbers"),
        (with_annotation(bbox=["1", 2, 3, 4]), "annotation id 1: 'bbox' must be four finite numbers"),
        (with_annotation(image_id=None), "annotation id 1: its image_id None is not among the file's image ids"),
        (with_annotation(category_id=99), "annotation id 1: its category_id 99 is not among the file's category ids"),
    ],
)
def test_unusable_annotations(data, message, load):
    with pytest.raises(InputError, match=message) as error:
        load(data)
    assert "instances_val2017.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(folder, load, parse):
    with pytest.raises(InputError, match=r"--coco_path .*nowhere: no such folder"):
        build_dataset("val", parse("--coco_path", folder / "nowhere"))
    with pytest.raises(InputError, match=r"no val data: .* with --coco_path"):
        build_dataset("val", parse())
    with pytest.raises(InputError, match=r"no annotations of the train images; it holds annotations/instances_val2017"):
        build_dataset("train", parse("--coco_path", folder))
    (folder / "images" / "val2017" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"val2017: 1 of 2 images of .* is missing: a.jpg"):
        load()


def test_an_image_that_cannot_be_decoded_is_named(folder, load):
    (folder / "images" / "val2017" / "a.jpg").write_bytes(b"no image")
    dataset = load()
    with pytest.raises(InputError, match=r"a.jpg \(image id 7\): cannot be decoded"):
        dataset[1]


def test_an_image_of_another_size_than_in_the_file_is_named(folder, load):
    Image.new("RGB", (30, 40)).save(folder / "images" / "val2017" / "a.jpg")
    dataset = load()
    with pytest.raises(InputError, match=r"a.jpg \(image id 7\): is 30×40, but .*json says 40×30"):
        dataset[1]


def test_exif_orientation_is_not_applied(folder, load):
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate the image
    Image.new("RGB", (40, 30)).save(folder / "images" / "val2017" / "a.jpg", exif=exif)
    assert load()[1][0].shape == (3, 800, 1066)


def test_a_worker_reports_the_same_line(folder, load, parse):
    (folder / "images" / "val2017" / "a.jpg").write_bytes(b"no image")
    loader = build_loader(load(), parse("--num_workers", 1), train=False)
    with pytest.raises(InputError) as error:
        list(loader)
    assert error.value.line.startswith(str(folder))
    assert "\n" not in error.value.line


def test_category_ids_beyond_the_head(load):
    dataset = load()
    dataset.check_classes(3)
    with pytest.raises(InputError, match=r"category id 2 \(cat\) does not fit a model of 2 classes"):
        dataset.check_classes(2)


def test_training_needs_one_full_batch(load, parse):
    assert len(build_loader(load(), parse("--batch_size", 3), train=False)) == 2
    with pytest.raises(InputError, match="2 images are fewer than a batch of 3"):
        build_loader(load(), parse("--batch_size", 3), train=True)


def test_other_data_sets_are_refused(parse):
    with pytest.raises(InputError, match="--dataset_file lvis: choose one of coco, coco_panoptic"):
        build_dataset("val", parse("--dataset_file", "lvis"))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"x.json: not JSON"):
        read_annotations(tmp_path / "x.json")
