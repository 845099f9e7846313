"""The evaluator: pycocotools' numbers, whatever the order and number of images."""

import gzip
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from datasets.annotations import read_annotations
from datasets.coco_eval import CocoEvaluator, evaluation_as_plain_data
from tests.reference import DATA


@pytest.fixture(scope="module")
def sample() -> dict:
    return json.loads(gzip.decompress((DATA / "coco_eval100.json.gz").read_bytes()))


@pytest.fixture
def coco(sample, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(sample["ground_truth"]))
    return read_annotations(path)


def predictions(sample: dict, kind: str) -> dict[int, dict[str, torch.Tensor]]:
    by_image = {}
    for image in sample["ground_truth"]["images"]:
        results = [r for r in sample[kind] if r["image_id"] == image["id"]]
        boxes = torch.tensor([r.get("bbox", [0, 0, 1, 1]) for r in results], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        by_image[image["id"]] = {
            "scores": torch.tensor([r["score"] for r in results], dtype=torch.float64),
            "labels": torch.tensor([r["category_id"] for r in results], dtype=torch.int64),
            "boxes": boxes,
        }
        if kind == "segm":
            masks = [mask_api.decode(r["segmentation"]) for r in results]
            shape = (-1, 1, image["height"], image["width"])
            by_image[image["id"]]["masks"] = torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(shape))
    return by_image


def score(coco, iou_type: str, batches: list[dict]) -> CocoEvaluator:
    evaluator = CocoEvaluator(coco, [iou_type])
    for batch in batches:
        evaluator.update(batch)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_twelve_numbers(iou_type, sample, coco, capsys):
    by_image = predictions(sample, iou_type)
    assert len(by_image) == 100
    assert any(len(p["scores"]) == 0 for p in by_image.values())
    evaluator = score(coco, iou_type, [{i: p} for i, p in by_image.items()])
    assert evaluator.coco_eval[iou_type].stats.tolist() == pytest.approx(sample["expected"][iou_type], abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.count(" Average ") == 12
    assert "toothbrush" in printed


def test_an_image_counts_once(sample, coco):
    by_image = predictions(sample, "bbox")
    first = dict(list(by_image.items())[:1])
    evaluator = score(coco, "bbox", [by_image, first])
    assert evaluator.coco_eval["bbox"].stats.tolist() == pytest.approx(sample["expected"]["bbox"], abs=1e-6)


def test_only_the_images_given_are_scored(sample, coco):
    by_image = predictions(sample, "bbox")
    some = dict(list(by_image.items())[:20])
    evaluator = score(coco, "bbox", [some])
    assert evaluator.coco_eval["bbox"].params.imgIds == sorted(some)
    assert evaluator.coco_eval["bbox"].stats[0] > 0


def test_without_a_single_detection(sample, coco):
    none = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    evaluator = score(coco, "bbox", [{image["id"]: none for image in sample["ground_truth"]["images"]}])
    assert evaluator.coco_eval["bbox"].stats[0] == 0


def test_the_saved_arrays_load_as_plain_data(sample, coco, tmp_path):
    evaluator = score(coco, "bbox", [predictions(sample, "bbox")])
    torch.save(evaluation_as_plain_data(evaluator.coco_eval["bbox"]), tmp_path / "eval.pth")
    saved = torch.load(tmp_path / "eval.pth", weights_only=True)
    assert saved["precision"].shape == (10, 101, 80, 4, 3)
    precision = saved["precision"][:, :, :, 0, -1]
    assert precision[precision > -1].mean().item() == pytest.approx(sample["expected"]["bbox"][0], abs=1e-6)
    assert len(saved["params"]["imgIds"]) == 100
