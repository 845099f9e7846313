"""The evaluator: pycocotools' numbers, whatever the order and number of images."""

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.annotations import read_annotations
from datasets.coco_eval import CocoEvaluator, evaluation_as_plain_data
from datasets.coco_index import index
from tests.reference import DATA


@pytest.fixture(scope="module")
def sample() -> dict:
    return json.loads(gzip.decompress((DATA / "coco_eval100.json.gz").read_bytes()))


@pytest.fixture
def coco(sample, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(sample["ground_truth"]))
    ground_truth, _ = read_annotations(path)
    return ground_truth


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


def detections_of(evaluator: CocoEvaluator, iou_type: str) -> COCO:
    """Return the detections of an evaluator in the format of pycocotools."""
    annotations = []
    for image_id, detections in sorted(evaluator.detections.items()):
        masks = detections.masks() if iou_type == "segm" else [None] * len(detections.rows)
        for (category, score, *box), mask in zip(detections.rows[:, :6].tolist(), masks, strict=True):
            area = float(mask_api.area(mask)) if mask else box[2] * box[3]
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(category), "score": score}
            annotations.append(entry | {"bbox": box, "area": area, "segmentation": mask, "iscrowd": 0})
    return index({"images": evaluator.coco_gt.dataset["images"], "annotations": annotations})


def assert_as_pycocotools(evaluator: CocoEvaluator, iou_type: str) -> None:
    """Check that all results are those of pycocotools for the same detections."""
    ours = evaluator.coco_eval[iou_type]
    reference = COCOeval(copy.deepcopy(evaluator.coco_gt), detections_of(evaluator, iou_type), iou_type)
    reference.params = copy.deepcopy(ours.params)
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    np.testing.assert_allclose(ours.stats, reference.stats, atol=1e-9, rtol=0)
    assert ours.eval.keys() == reference.eval.keys()
    assert ours.eval["counts"] == reference.eval["counts"]
    for key in ("precision", "recall", "scores"):
        assert ours.eval[key].dtype == reference.eval[key].dtype
        np.testing.assert_allclose(ours.eval[key], reference.eval[key], atol=1e-9, rtol=0)
    assert vars(ours.params).keys() == vars(reference.params).keys()


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
    assert_as_pycocotools(evaluator, iou_type)


@pytest.mark.parametrize("seed", range(4))
def test_crowded_scenes_are_scored_as_by_pycocotools(seed):
    """Overlaps, crowds, areas that are ignored, ties of scores, more than 100 detections, or none."""
    rng = np.random.default_rng(seed)
    images = [{"id": i} for i in range(1, 13)]
    annotations, found = [], {}
    for image in images:
        boxes = rng.integers(0, 20, (rng.integers(0, 9), 4)) * [9, 9, 12, 12] + [0, 0, 1, 1]
        for box in boxes.tolist():
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": rng.integers(1, 4)})
            annotations[-1] |= {"bbox": box, "area": box[2] * box[3] * 0.6, "iscrowd": int(rng.random() < 0.2)}
        n = int(rng.choice([0, 3, 130])) if len(boxes) else 5
        guesses = (boxes if len(boxes) else np.ones((1, 4)))[rng.integers(0, max(len(boxes), 1), n)]
        guesses = guesses + rng.integers(-3, 4, (n, 4))
        found[image["id"]] = {
            "scores": torch.from_numpy(rng.integers(0, 40, n) / 40),
            "labels": torch.from_numpy(rng.integers(1, 5, n)),
            "boxes": torch.from_numpy(np.concatenate([guesses[:, :2], guesses[:, :2] + guesses[:, 2:]], 1)),
        }
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3, 7)]
    evaluator = score(index({"images": images, "annotations": annotations, "categories": categories}), "bbox", [found])
    assert 0 < evaluator.coco_eval["bbox"].stats[0] < 1
    assert_as_pycocotools(evaluator, "bbox")


def test_parameters_that_were_set_are_used(sample, coco):
    evaluator = CocoEvaluator(coco, ["bbox"])
    params = evaluator.coco_eval["bbox"].params
    params.iouThrs, params.catIds = np.array([0.5, 0.75]), [1, 3, 18]
    evaluator.update(predictions(sample, "bbox"))
    evaluator.accumulate()
    evaluator.coco_eval["bbox"].summarize()
    assert evaluator.coco_eval["bbox"].eval["precision"].shape == (2, 101, 3, 4, 3)
    assert_as_pycocotools(evaluator, "bbox")


def test_image_ids_of_64_bits():
    """Float64 would hold only 53 of the bits; ids may also be negative."""
    ids = [-5, 2**62, 2**62 + 1]
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
        for n, i in enumerate(ids, start=1)
    ]
    truth = index(
        {"images": [{"id": i} for i in ids], "annotations": annotations, "categories": [{"id": 1, "name": ""}]}
    )
    there = {"scores": torch.ones(1), "labels": torch.ones(1), "boxes": torch.tensor([[0, 0, 9, 9]])}
    elsewhere = there | {"boxes": torch.tensor([[20, 20, 29, 29]]), "scores": torch.ones(1) / 2}
    evaluator = score(truth, "bbox", [{ids[0]: there, ids[1]: there, ids[2]: elsewhere}])
    assert evaluator.coco_eval["bbox"].stats[8] == pytest.approx(2 / 3)  # recall
    assert_as_pycocotools(evaluator, "bbox")


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


def test_without_detections(sample, coco):
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
