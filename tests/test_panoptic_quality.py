"""Panoptic quality: its definition, and its scores from several processes."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.classes import Classes
from evaluation.panoptic_quality import PanopticEvaluator
from run.log_file import append_log
from tests.conftest import log_lines
from tests.forked import run_on_several
from tests.panoptic import NAMES, read, write_panoptic, write_two
from tests.two_processes import join
from util.distributed import leave_process_group


@pytest.fixture
def two(tmp_path) -> Path:
    """Return a folder with panoptic data of two images."""
    return write_two(tmp_path)


def quality_by_definition(pairs, isthing: dict[int, bool]) -> dict[str, float]:
    """Return PQ as its paper defines it.

    Each pair has an image's ground truth (ids [H, W], {id: (category, iscrowd)}) and prediction (ids [H, W],
    {id: category}).
    """
    found = {k: [0.0, 0, 0, 0] for k in isthing}  # sum of IoUs, true positives, false positives, misses
    for (true_ids, true), (ids, predicted) in pairs:
        matched_true, matched = set(), set()
        for t, (k, crowd) in true.items():
            for p, category in predicted.items():
                mask, other = true_ids == t, ids == p
                union = (mask | other & (true_ids != 0)).sum()
                iou = (mask & other).sum() / union if union else 0
                if k == category and not crowd and iou > 0.5:
                    found[k][0] += iou
                    found[k][1] += 1
                    matched_true.add(t)
                    matched.add(p)
        for p in predicted.keys() - matched:
            ignored = np.isin(true_ids, [0, *(t for t, (k, crowd) in true.items() if crowd and k == predicted[p])])
            if (ignored & (ids == p)).sum() / (ids == p).sum() <= 0.5:
                found[predicted[p]][2] += 1
        for t, (k, crowd) in true.items():
            found[k][3] += not crowd and t not in matched_true
    scores = {k: s / (tp + fp / 2 + fn / 2) for k, (s, tp, fp, fn) in found.items() if tp + fp + fn}
    groups = {"PQ_all": scores, "PQ_th": {k: s for k, s in scores.items() if isthing[k]}}
    groups["PQ_st"] = {k: s for k, s in scores.items() if not isthing[k]}
    return {name: float(np.mean(list(of.values()))) if of else 0.0 for name, of in groups.items()}


def random_case(root: Path) -> tuple[dict, dict, dict]:
    """Write random ground truth for six images; return its id maps and segments, and predictions that resemble it."""
    rng = np.random.default_rng(3)
    maps, segments, predictions = {}, {}, {}
    for image_id in range(1, 7):
        blocks = rng.integers(0, 5, (3, 4)) * 1_000
        maps[image_id] = np.kron(blocks, np.ones((6, 6), dtype=np.int64))
        listed = [i for i in np.unique(maps[image_id]).tolist() if i]
        segments[image_id] = [(i, int(rng.choice(list(NAMES))), int(rng.random() < 0.2)) for i in listed]
        ids = np.roll(maps[image_id] // 1_000, int(rng.integers(0, 3)), axis=1)
        numbers = np.unique(ids).tolist()
        category = {i // 1_000: k for i, k, _ in segments[image_id]}
        labels = [category.get(n, 9) if rng.random() < 0.8 else int(rng.choice(list(NAMES))) for n in numbers]
        ids = np.searchsorted(numbers, ids)
        info = [{"id": i, "category_id": k, "area": int((ids == i).sum())} for i, k in enumerate(labels)]
        predictions[image_id] = {"panoptic": {"ids": torch.from_numpy(ids), "segments_info": info}}
    write_panoptic(root, maps, segments)
    return maps, segments, predictions


def test_quality_follows_its_definition(tmp_path):
    maps, segments, predictions = random_case(tmp_path)
    evaluator = PanopticEvaluator(read(tmp_path), tmp_path / "out")
    evaluator.update(predictions)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    pairs = []
    for image_id, prediction in predictions.items():
        found = prediction["panoptic"]
        predicted = {entry["id"]: entry["category_id"] for entry in found["segments_info"]}
        true = {i: (k, crowd) for i, k, crowd in segments[image_id]}
        pairs.append(((maps[image_id], true), (found["ids"].numpy(), predicted)))
    expected = quality_by_definition(pairs, {k: k < 5 for k in NAMES})
    assert 0.1 < expected["PQ_all"] < 0.9
    for name, value in expected.items():
        assert evaluator.stats[name]["pq"] == pytest.approx(value, abs=1e-12), name
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in written] == list(maps)
    assert {segment["category_name"] for entry in written for segment in entry["segments_info"]} <= {*NAMES.values()}
    pixels = np.asarray(Image.open(tmp_path / "out" / written[0]["file_name"])).astype(int)
    assert set(np.unique(pixels[..., 0])) == {segment["id"] for segment in written[0]["segments_info"]}


def test_a_predicted_class_that_the_data_lacks_is_wrong(two):
    """This happens if val has fewer classes than the model."""
    dataset = read(two)
    classes = dataset.classes | Classes({12: 12}, {12: "tree"}, {12: False})
    evaluator = PanopticEvaluator(dataset, None, classes)
    segments = [{"id": 0, "category_id": 12, "area": 256}]
    evaluator.update({11: {"panoptic": {"ids": torch.zeros(16, 16, dtype=torch.int64), "segments_info": segments}}})
    evaluator.accumulate()
    assert evaluator.quality_by_class() == {9: 0, 12: 0}
    assert evaluator.stats["PQ_st"] == {"pq": 0, "sq": 0, "rq": 0, "n": 2}


def score_a_part(
    rank: int, world_size: int, meeting: dict, args: argparse.Namespace, root: Path, predictions: dict
) -> None:
    """Score every other image on this process, and the first one on both."""
    join(rank, world_size, meeting, args)
    evaluator = PanopticEvaluator(read(root), None)
    evaluator.update({i: found for i, found in predictions.items() if i == 1 or i % world_size == rank})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    (root / f"{world_size}-{rank}.json").write_text(json.dumps(evaluator.stats))
    leave_process_group()


def test_two_processes_gather_their_results(tmp_path, parse, meeting):
    *_, predictions = random_case(tmp_path)
    evaluator = PanopticEvaluator(read(tmp_path), None)
    evaluator.update(predictions)
    evaluator.accumulate()
    run_on_several(score_a_part, (2, meeting(), parse(), tmp_path, predictions), 2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"2-{rank}.json").read_text()) == evaluator.stats


def test_quality_that_is_not_a_number_is_null_in_the_log(tmp_path):
    append_log(tmp_path / "log.txt", {"epoch": 0, "test_PQ_all": {"pq": float("nan"), "n": 0}})
    assert log_lines(tmp_path) == [{"epoch": 0, "test_PQ_all": {"pq": None, "n": 0}}]
