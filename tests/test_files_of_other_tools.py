"""Annotation files of exporters, converters and people: they are accepted, or one line names their kind."""

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import main
from datasets.coco_eval import CocoEvaluator
from scripts import check_data
from tests.cells import NAMES, SIZE, cells, load_cells
from tests.conftest import TINY
from util.errors import InputError


@pytest.fixture
def load(tmp_path):
    return partial(load_cells, tmp_path)


def flags(folder: Path, *more: object) -> list[str]:
    files = [
        part
        for split in ("train", "val")
        for part in (f"--{split}_images", folder / split, f"--{split}_annotations", folder / f"{split}.json")
    ]
    return [str(flag) for flag in (*TINY, *files, *more)]


def renumbered(data: dict, ids: dict[int, int]) -> dict:
    """Return annotations with other category ids; classes without a new id are left out."""
    kept = [entry for entry in data["annotations"] if entry["category_id"] in ids]
    return data | {
        "categories": [entry | {"id": ids[entry["id"]]} for entry in data["categories"] if entry["id"] in ids],
        "annotations": [entry | {"category_id": ids[entry["category_id"]]} for entry in kept],
    }


@pytest.mark.parametrize("ids", [{1: 3, 2: 1, 3: 2}, {2: 1, 3: 2}], ids=["permuted", "missing"])
def test_classes_with_other_ids_in_val_are_matched_by_name(ids, load, tmp_path, capsys):
    train = load(cells())
    val = load(renumbered(cells("val"), ids), "val", classes=train.classes)
    printed = capsys.readouterr().out
    assert f"classes have other ids than in {train.annotation_file} (" in printed
    assert "): matched by name" in printed
    names = [[train.classes.name_of(label) for label in val[0][1]["labels"].tolist()]]
    assert names == [[NAMES[class_id] for class_id in sorted(ids)]]

    check_data.main(flags(tmp_path))
    assert "matched by name" in capsys.readouterr().out.splitlines()[0]
    args = main.get_args_parser().parse_args(flags(tmp_path, "--epochs", 1, "--output_dir", tmp_path / "run"))
    main.main(args)
    resume = ("--eval", "--resume", tmp_path / "run" / "checkpoint.pth", "--output_dir", tmp_path / "eval")
    main.main(main.get_args_parser().parse_args(flags(tmp_path, *resume)))
    for found in json.loads((tmp_path / "eval" / "detections.json").read_text()):
        assert NAMES[{new: old for old, new in ids.items()}[found["category_id"]]] == found["category_name"]


def test_classes_with_the_same_name_are_reported(load, capsys):
    repeated = cells()
    repeated["categories"][2]["name"] = "RBC"
    train = load(repeated)
    assert "the categories 2, 3 have the same name 'RBC'" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"val.json: category id 3 is 'Platelets', but 'RBC'"):
        load(cells("val"), "val", classes=train.classes)


def relative(data: dict) -> dict:
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        entry |= {"bbox": [x / SIZE[0], y / SIZE[1], w / SIZE[0], h / SIZE[1]], "area": w * h / SIZE[0] / SIZE[1]}
    return data


def corners(data: dict) -> dict:
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]
    return data


def large_areas(data: dict) -> dict:
    for entry in data["annotations"][:5]:
        entry["area"] = 4000
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relative, "12 of 12 boxes with coordinates between 0 and 1, which look relative to the image's size"),
        (corners, "12 of 12 boxes beyond the image, as if written as corners [x1, y1, x2, y2]"),
        (large_areas, "5 of 12 boxes with an 'area' larger than width × height"),
    ],
)
def test_boxes_in_another_format_are_reported(change, message, load, capsys):
    load(change(cells()))
    assert message in capsys.readouterr().out


def test_valid_boxes_that_look_odd_give_no_warning(load, capsys):
    """Boxes of the whole image, of one pixel, of half a pixel, and one that ends a pixel outside the image."""
    data = cells()
    odd = ([0, 0, *SIZE], [0, 0, 1, 1], [100, 60, 61, 60], [1, 1, 0.5, 0.5])
    for entry, box in zip(data["annotations"], odd, strict=False):
        entry |= {"bbox": list(box), "area": box[2] * box[3] / 2}
    load(data)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["byte-order mark", "utf-16", "gzip"],
)
def test_files_may_have_other_encodings(encode, load):
    assert load(encode(json.dumps(cells()))).summary() == load(cells()).summary()


def test_damaged_gzip_files_are_refused(load):
    with pytest.raises(InputError, match=r"train.json: not a gzip file, or a damaged one"):
        load(gzip.compress(json.dumps(cells()).encode())[:-20])


def test_sizes_may_be_floats_or_strings_or_missing(load):
    data = cells()
    for entry, (width, height) in zip(
        data["images"], ((0, 0), (160.0, 120.0), ("160", "120"), (None, 120)), strict=True
    ):
        entry |= {"width": width, "height": height}
    dataset = load(data)
    assert dataset.records.sizes.tolist() == [[0, 0], [160, 120], [160, 120], [0, 120]]
    assert [len(dataset[i][1]["labels"]) for i in range(4)] == [3] * 4


def test_image_ids_may_be_strings(load, tmp_path):
    def with_strings(data: dict) -> dict:
        own = {entry["id"]: Path(entry["file_name"]).stem for entry in data["images"]}
        for entry in data["images"]:
            entry["id"] = own[entry["id"]]
        for entry in data["annotations"]:
            entry["image_id"] = own[entry["image_id"]]
        return data

    dataset = load(with_strings(cells()))
    assert [len(dataset[i][1]["labels"]) for i in range(4)] == [3] * 4
    (tmp_path / "train" / "train02.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"train02.jpg \(image id train02\): cannot be decoded"):
        dataset[1]
    load(with_strings(cells()))
    load(with_strings(cells("val")), "val")
    main.main(main.get_args_parser().parse_args(flags(tmp_path, "--eval", "--output_dir", tmp_path / "eval")))
    found = json.loads((tmp_path / "eval" / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == {f"val{i:02}" for i in range(1, 5)}
    assert {path.name[3:] for path in (tmp_path / "eval" / "worst").iterdir()} <= {
        f"val{i:02}.jpg" for i in range(1, 5)
    }


def test_annotations_may_write_integer_ids_as_strings(load):
    data = cells()
    for entry in data["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    assert load(data).summary().boxes == 12


def test_faults_of_annotations_are_mended_or_left_out_and_counted(load, capsys):
    data = cells()
    polygon = {"segmentation": [[10, 20, 30, 20, 30, 60]]}
    data["annotations"][0] |= {"bbox": []} | polygon
    data["annotations"][1] |= {"bbox": None}
    data["annotations"][2] |= {"bbox": [], "segmentation": {"counts": "x", "size": [1, 1]}}
    data["annotations"][3]["id"] = data["annotations"][4]["id"]
    data["annotations"][5]["image_id"] = 99
    dataset = load(data)
    assert dataset[0][1]["boxes"].tolist() == [pytest.approx([20 / 160, 40 / 120, 20 / 160, 40 / 120])]
    assert len(set(dataset.coco.anns)) == dataset.summary().boxes == 9
    printed = capsys.readouterr().out
    assert "2 annotations without a box or a usable segmentation: left out" in printed
    assert "1 annotation of images that the file does not list: left out" in printed
    assert "1 annotation with the id of another got a new id" in printed


def first(data: dict, key: str, **more: object) -> dict:
    data[key][0] |= more
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (first(cells(), "annotations", segments_info=[]), "a panoptic file"),
        (first(cells(), "images", neg_category_ids=[]), "an LVIS file"),
        (first(cells(), "categories", synset="cat.n.01"), "an LVIS file"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "a list of detections"),
        (cells() | {"videos": []}, "a file of videos"),
        (first(cells(), "annotations", caption="a cat"), "a file of captions"),
        ({"shapes": [], "imagePath": "a.jpg"}, "labelme's file"),
    ],
)
def test_files_of_another_kind_are_named(data, message, load):
    with pytest.raises(InputError, match=rf"train.json: {message}.*; name a COCO instance file"):
        load(data)


def test_images_with_many_objects_need_higher_limits(load, tmp_path, capsys):
    crowded = cells()
    template = crowded["annotations"][0]
    crowded["annotations"] = [template | {"id": i + 1} for i in range(130)]
    load(crowded)
    load(cells("val"), "val")
    check_data.main(flags(tmp_path))
    printed = capsys.readouterr().out
    assert "train: 1 image has more boxes than the model's 8 queries can find: pass --num_queries 130" in printed
    assert (
        "train: 1 image has more boxes than the limit of 100 detections per image: pass --max_detections 130" in printed
    )


def test_more_than_100_detections_are_scored_in_extra_lines(load, capsys):
    """COCO's 12 numbers count 100 detections per image; if 200 count, all 150 objects are found, and AP is 1."""
    data = cells(images=1) | {"images": cells()["images"]}
    data["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [i, 0, 1, 100], "area": 100, "iscrowd": 0}
        for i in range(150)
    ]
    dataset = load(data)
    boxes = torch.tensor([[i, 0, i + 1, 100] for i in range(150)], dtype=torch.float64)
    found = {"scores": torch.linspace(1, 0.5, 150), "labels": torch.ones(150, dtype=torch.int64), "boxes": boxes}
    stats = []
    for most in (100, 200):
        evaluator = CocoEvaluator(dataset.coco, ("bbox",), most)
        evaluator.update({1: found})
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        evaluator.summarize()
        stats.append(evaluator.coco_eval["bbox"].stats.tolist())
    assert stats[0] == stats[1]
    printed = capsys.readouterr().out
    assert printed.count("maxDets=200 ] = 1.000") == 2
    assert stats[0][0] < 0.7
