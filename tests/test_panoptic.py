"""Panoptic data and quality: from PNG files to samples, training, evaluation and prediction."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from datasets import build_dataset
from datasets.classes import Classes
from datasets.panoptic import PanopticDetection
from datasets.panoptic_file import load_panoptic
from datasets.shapes import write_dataset
from evaluation.panoptic_quality import PanopticEvaluator
from models.postprocess_masks import PostProcessPanoptic, png_of_ids
from run.log_file import append_log
from scripts import check_data, predict
from tests.conftest import TINY, assert_same_end, log_lines
from tests.forked import run_on_several
from tests.two_processes import join
from util.distributed import leave_process_group
from util.errors import InputError

NAMES = {1: "cat", 2: "dog", 7: "sky", 9: "grass"}
CATEGORIES = [{"id": i, "name": name, "isthing": int(i < 5)} for i, name in NAMES.items()]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Generate panoptic data that tests only read."""
    root = tmp_path_factory.mktemp("panoptic")
    write_dataset(root, num_train=8, num_val=5, panoptic=True)
    return root


def data_flags(root: Path) -> tuple[object, ...]:
    return ("--dataset_file", "coco_panoptic", "--coco_path", root, "--coco_panoptic_path", root, "--num_classes", 6)


def write_panoptic(root: Path, maps: dict[int, np.ndarray], segments: dict[int, list[tuple[int, int, int]]]) -> Path:
    """Write images of one colour and panoptic annotations: id maps [H, W], and (id, category, iscrowd) of segments."""
    for name in ("images", "panoptic"):
        (root / name).mkdir(parents=True)
    images, annotations = [], []
    for image_id, ids in maps.items():
        Image.new("RGB", ids.shape[::-1]).save(root / "images" / f"{image_id}.jpg")
        (root / "panoptic" / f"{image_id}.png").write_bytes(png_of_ids(torch.from_numpy(ids)))
        size = {"width": ids.shape[1], "height": ids.shape[0]}
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", **size})
        listed = [{"id": i, "category_id": k, "iscrowd": crowd} for i, k, crowd in segments[image_id]]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": listed})
    # Reversed, because annotations are matched with images by their ids, not by their order.
    contents = {"images": images, "annotations": annotations[::-1], "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(contents))
    return root / "panoptic.json"


def read(root: Path, **settings) -> PanopticDetection:
    return PanopticDetection(
        root / "images", root / "panoptic.json", root / "panoptic", transforms=lambda *sample: sample[:2], **settings
    )


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture
def two(tmp_path):
    """Write two images: one with a thing, a crowd and stuff, and one with a single segment."""
    first = np.zeros((20, 30), dtype=np.int64)
    first[2:10, 3:12], first[10:18, 5:25], first[18:, :] = 70_000, 300, 5
    second = np.full((16, 16), 9)
    segments = {4: [(70_000, 2, 0), (300, 1, 1), (5, 7, 0)], 11: [(9, 9, 0)]}
    write_panoptic(tmp_path, {4: first, 11: second}, segments)
    return tmp_path


def test_boxes_areas_and_masks_come_from_the_pixels(two):
    dataset = read(two, masks=True)
    assert dataset.ids == [4, 11]
    target = dataset.target_of(0, 30, 20)
    assert target["labels"].tolist() == [2, 1, 7]
    assert target["boxes"].tolist() == [[3, 2, 11, 9], [5, 10, 24, 17], [0, 18, 29, 19]]
    assert target["area"].tolist() == [72, 160, 60]
    assert target["iscrowd"].tolist() == [0, 1, 0]  # crowds are targets in panoptic data
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].flatten(1).sum(1).tolist() == [72, 160, 60]
    assert "masks" not in read(two).target_of(0, 30, 20)
    assert dataset.classes.isthing == {1: True, 2: True, 7: False, 9: False}
    assert dataset.summary().boxes == 4


def test_records_of_panoptic_data_survive_sharing_and_selection(two):
    dataset = read(two, masks=True, share=True)  # through the arrays that processes exchange
    assert dataset.classes.isthing[7] is False
    dataset.keep_first(1, at_least=3)
    assert [dataset.segments.files.at(i) for i in range(len(dataset))] == ["4.png"] * 3
    assert dataset.records.segment_ids_of(2).tolist() == [70_000, 300, 5]
    assert len(dataset[2][1]["labels"]) == 3


def test_segments_without_pixels_or_one_pixel_wide_are_not_targets(tmp_path):
    ids = np.full((8, 8), 1)
    ids[:, 3] = 2  # a single column
    write_panoptic(tmp_path, {1: ids}, {1: [(1, 7, 0), (2, 1, 0), (3, 2, 0)]})
    target = read(tmp_path, masks=True).target_of(0, 8, 8)
    assert target["labels"].tolist() == [7]


def delete_png(root):
    (root / "panoptic" / "4.png").unlink()


def write_larger_png(root):
    Image.new("RGB", (30, 21)).save(root / "panoptic" / "4.png")


def truncate_png(root):
    path = root / "panoptic" / "4.png"
    path.write_bytes(path.read_bytes()[:50])


def add_segments(root):
    ids = torch.full((20, 30), 300)
    ids[0, :4] = torch.tensor([1, 2, 3, 3])
    (root / "panoptic" / "4.png").write_bytes(png_of_ids(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete_png, r"1 of 2 images .* missing: 4.png"),
        (write_larger_png, r"4.png \(image id 4\): is 30×21, but its image is 30×20"),
        (truncate_png, r"4.png \(image id 4\): cannot be decoded"),
        (add_segments, r"4.png \(image id 4\): contains segment 1 and 2 others, which .*panoptic.json does not list"),
    ],
)
def test_bad_png_files_are_named_or_skipped(two, change, message, capsys):
    change(two)
    with pytest.raises(InputError, match=message):
        read(two)[0]
    dataset = read(two, on_bad_image="skip")
    assert dataset[0][1]["image_id"].tolist() == [11]
    assert "4.jpg (image id 4)" in dataset.describe_skipped(dataset.take_skipped())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "it has no list 'categories'"),
        (lambda d: d["annotations"].__setitem__(0, {"bbox": [1, 1, 2, 2]}), "an instance file"),
        (lambda d: d["categories"][0].pop("isthing"), "category id 1: 'isthing' must be 1"),
        (lambda d: d["annotations"][1].pop("file_name"), "annotation number 1: must have 'file_name'"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "image id 11 already has an annotation"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(id=0), "integer from 1 to 16777215"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(id=5), "segment id 5 is used twice"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(category_id=3), "segment id 70000: its category_id"),
        (lambda d: d["annotations"][1]["segments_info"][0].update(iscrowd=2), "'iscrowd' must be 0 or 1"),
        (lambda d: d["annotations"][1].update(segments_info=[3]), "the id of each segment"),
    ],
)
def test_bad_entries_are_named(two, change, message):
    edit(two / "panoptic.json", change)
    with pytest.raises(InputError, match=f"panoptic.json: .*{message}"):
        read(two)


def test_entries_that_are_left_out_are_counted(two, capsys):
    edit(two / "panoptic.json", lambda d: d["annotations"][0].update(image_id=77))
    assert read(two).ids == [4]
    printed = capsys.readouterr().out
    assert "1 annotation of images that the file does not list: left out" in printed
    assert "1 image without an annotation left out" in printed


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_is_read_or_gives_one_line(two, data):
    """A value of any type in any place of the file gives samples, or one line that names the file."""
    contents = json.loads((two / "panoptic.json").read_text())
    annotation = contents["annotations"][1]
    place = data.draw(st.sampled_from([contents, contents["images"][0], annotation, annotation["segments_info"][0]]))
    key = data.draw(st.sampled_from(sorted({*place, "bbox", "area"})))
    place[key] = data.draw(VALUES)
    (two / "changed.json").write_text(json.dumps(contents))
    try:
        dataset = PanopticDetection(two / "images", two / "changed.json", two / "panoptic", transforms=lambda *s: s[:2])
        for index in range(len(dataset)):
            _ = dataset[index]
    except InputError as error:
        assert "\n" not in str(error)
        assert str(two) in str(error)


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


def test_labels_without_a_class_are_not_predicted():
    outputs = {"pred_logits": torch.tensor([[[0.0, 9, 0], [9, 0, 0]]]), "pred_masks": torch.ones(1, 2, 4, 4)}
    (result,) = PostProcessPanoptic({0: True})(outputs, [(16, 16)])
    assert [segment["category_id"] for segment in result["segments_info"]] == [0]


def test_panoptic_models_train_resume_evaluate_and_predict(scenes, tmp_path, parse, capsys):
    flags = (*TINY, *data_flags(scenes), "--masks")
    main.main(parse(*flags, "--epochs", 2, "--output_dir", tmp_path / "once"))
    lines = log_lines(tmp_path / "once")
    for line in lines:
        assert len(line["test_coco_eval_masks"]) == len(line["test_coco_eval_bbox"]) == 12
        assert all(line[f"test_PQ_{group}"].keys() == {"pq", "sq", "rq", "n"} for group in ("all", "th", "st"))
    assert len(list((tmp_path / "once" / "panoptic_eval").glob("*.png"))) == 5
    for epochs in (1, 2):
        main.main(parse(*flags, "--epochs", epochs, "--output_dir", tmp_path / "twice", "--resume", "auto"))
    assert_same_end(tmp_path / "twice", tmp_path / "once")

    model = tmp_path / "once" / "checkpoint.pth"
    assert torch.load(model, weights_only=True)["class_isthing"] == {1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    capsys.readouterr()
    main.main(parse(*flags, "--eval", "--resume", model, "--output_dir", tmp_path / "eval"))
    assert "PQ by class" in capsys.readouterr().out
    assert {"panoptic_quality.png", "worst_panoptic", "panoptic_eval", "worst"} <= {
        path.name for path in (tmp_path / "eval").iterdir()
    }

    image = min((scenes / "images" / "val2017").iterdir())
    out = tmp_path / "predictions"
    places = ("--checkpoint", str(model), "--output", str(out), str(image))
    predict.main(["--device", "cpu", "--panoptic_threshold", "0", *places])
    (entry,) = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert entry["segments_info"]
    pixels = np.asarray(Image.open(out / "panoptic" / entry["file_name"])).astype(int)
    areas = {segment["id"]: segment["area"] for segment in entry["segments_info"]}
    assert dict(zip(*(part.tolist() for part in np.unique(pixels[..., 0], return_counts=True)), strict=True)) == areas
    assert Image.open(out / "pictures" / image.name).size == Image.open(image).size


def test_a_model_without_masks_trains_on_panoptic_data(scenes, tmp_path, parse, capsys):
    flags = (*TINY, *data_flags(scenes), "--epochs", 1)
    main.main(parse(*flags, "--coco_path", scenes / "images", "--val_images", scenes / "images" / "val2017",
                    "--train_images", scenes / "images" / "train2017", "--output_dir", tmp_path))  # fmt: skip
    assert "AP of boxes and masks is not measured: --coco_path" in capsys.readouterr().out
    (line,) = log_lines(tmp_path)
    assert line["test_loss_bbox"] > 0
    assert not [name for name in line if "coco" in name or "PQ" in name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coco_panoptic_path", "x"), "--coco_panoptic_path: panoptic data needs --dataset_file coco_panoptic"),
        (("--dataset_file", "coco_panoptic"), "name the folder with annotations/ and the PNG files with --coco"),
        (("--dataset_file", "coco_panoptic", "--coco_panoptic_path", "/x"), "no annotations/panoptic_train2017.json"),
        (("--dataset_file", "lvis"), "choose one of coco, coco_panoptic"),
    ],
)
def test_wrong_flags_of_panoptic_data_are_refused(flags, message, parse):
    with pytest.raises(InputError, match=message):
        main.main(parse(*TINY, *flags))


def test_the_folder_of_png_files_is_next_to_the_annotations_or_above(scenes, parse, tmp_path):
    """COCO's archive has it next to the annotation file."""
    dataset = build_dataset("train", parse(*data_flags(scenes)))
    assert dataset.segments_folder == scenes / "panoptic_train2017"
    (tmp_path / "annotations").mkdir()
    file = scenes / "annotations" / "panoptic_val2017.json"
    (tmp_path / "annotations" / file.name).write_bytes(file.read_bytes())
    named = (
        "--dataset_file",
        "coco_panoptic",
        "--coco_path",
        scenes,
        "--val_annotations",
        tmp_path / "annotations" / file.name,
    )
    with pytest.raises(InputError, match="no folder panoptic_val2017 with its PNG files"):
        build_dataset("val", parse(*named))
    (tmp_path / "annotations" / "panoptic_val2017").symlink_to(scenes / "panoptic_val2017")
    dataset = build_dataset("val", parse(*named))
    assert dataset.segments_folder == tmp_path / "annotations" / "panoptic_val2017"


def test_check_data_draws_segments_and_counts_unusable_ones(scenes, tmp_path, capsys):
    edited = tmp_path / "annotations" / "panoptic_train2017.json"
    edited.parent.mkdir()
    edited.write_bytes((scenes / "annotations" / "panoptic_train2017.json").read_bytes())
    (tmp_path / "panoptic_train2017").symlink_to(scenes / "panoptic_train2017")
    edit(edited, lambda d: d["annotations"][0]["segments_info"].append({"id": 77, "category_id": 1}))
    flags = map(str, (*data_flags(scenes), "--train_annotations", edited, "--output_dir", tmp_path / "out"))
    assert check_data.main(list(flags)) == 0
    printed = capsys.readouterr().out
    assert "1 image: 1 segment without pixels" in printed
    assert Image.open(tmp_path / "out" / "train.jpg").size[0] > 1000


def test_a_published_file_is_read_with_gzip(two):
    packed = two / "panoptic.json.gz"
    packed.write_bytes(gzip.compress((two / "panoptic.json").read_bytes()))
    assert len(load_panoptic(packed).annotations) == 4
