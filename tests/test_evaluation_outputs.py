"""Files that an evaluation writes for people and for other tools."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import main
from datasets import build_dataset, get_coco_api_from_dataset
from datasets.classes import Classes
from datasets.coco_eval import CocoEvaluator
from evaluation.mistakes import worst_images
from evaluation.report import MOST_BARS, precision_recall, write_report
from tests.conftest import TINY
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")

IDS = {1: 10**7, 2: 17, 3: 18}  # category ids that cannot all be used as labels
TEST_FILE = "detections_test-dev2017_conddetr_results.json"


@pytest.fixture(scope="module")
def data(shapes, tmp_path_factory):
    """Copy the generated data, with other category ids and with the val images also as test-dev."""
    root = tmp_path_factory.mktemp("data") / "coco"
    shutil.copytree(shapes, root)
    path = root / "annotations" / "instances_val2017.json"
    contents = json.loads(path.read_text())
    for entry in (*contents["categories"], *contents["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = IDS[entry[key]]
    path.write_text(json.dumps(contents))
    del contents["annotations"]
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(contents))
    shutil.copytree(root / "images" / "val2017", root / "images" / "test2017")
    return root


@pytest.fixture
def dataset(data, parse):
    return build_dataset("val", parse(*TINY, "--coco_path", data))


def run(data, output, *more: object) -> None:
    flags = (*TINY, "--coco_path", data, "--output_dir", output, "--eval", *more)
    main.main(main.get_args_parser().parse_args([str(flag) for flag in flags]))


def guesses(dataset, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    """Return each object of every image twice, shifted at random and with random scores; masks fill the boxes."""
    rng = np.random.default_rng(seed)
    found = {}
    for image_id, (width, height) in zip(dataset.ids, dataset.records.sizes.tolist(), strict=True):
        objects = dataset.coco.imgToAnns[image_id] * 2
        boxes = np.array([entry["bbox"] for entry in objects]).reshape(-1, 4)
        boxes = boxes + rng.normal(0, 5, boxes.shape)
        found[image_id] = {
            "scores": torch.from_numpy(rng.random(len(boxes))).float(),
            "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64),
            "boxes": torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)).float(),
            "masks": torch.zeros(len(boxes), height, width),
        }
        for mask, (x1, y1, x2, y2) in zip(found[image_id]["masks"], found[image_id]["boxes"].int(), strict=True):
            mask[y1.clamp(0) : y2.clamp(0), x1.clamp(0) : x2.clamp(0)] = 1
    return found


def evaluate(dataset, found, kinds=("bbox",)) -> CocoEvaluator:
    evaluator = CocoEvaluator(get_coco_api_from_dataset(dataset), kinds)
    evaluator.update(found)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def test_pycocotools_computes_the_printed_ap_from_the_file(data, dataset, tmp_path):
    evaluator = evaluate(dataset, guesses(dataset))
    write_report(evaluator, dataset, dataset.classes, tmp_path)
    truth = COCO(data / "annotations" / "instances_val2017.json")
    again = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
    again.evaluate()
    again.accumulate()
    again.summarize()
    ours = evaluator.coco_eval["bbox"].stats
    assert 0.1 < ours[0] < 0.9
    assert again.stats.tolist() == pytest.approx(ours.tolist(), abs=1e-4)
    found = json.loads((tmp_path / "detections.json").read_text())
    names = {(entry["category_id"], entry["category_name"]) for entry in found}
    assert names == {(IDS[1], "circle"), (IDS[2], "square"), (IDS[3], "triangle")}


def test_the_report_covers_masks(data, parse, tmp_path, capsys):
    """Masks do not fill their boxes, so their AP differs; pycocotools uses the areas of boxes if it is given any."""
    dataset = build_dataset("val", parse(*TINY, "--coco_path", data, "--masks"))
    evaluator = evaluate(dataset, guesses(dataset), ("bbox", "segm"))
    write_report(evaluator, dataset, dataset.classes, tmp_path)
    files = {"detections.json", "precision_recall.png", "precision_recall_masks.png", "eval.pth", "eval_masks.pth"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"worst"}
    assert "wrote detections.json, precision_recall.png, precision_recall_masks.png and" in capsys.readouterr().out
    ours = evaluator.coco_eval["segm"].stats.tolist()
    assert 0.1 < ours[0] < 0.9
    assert ours[0] != evaluator.coco_eval["bbox"].stats[0]

    found = json.loads((tmp_path / "detections.json").read_text())
    truth = COCO(data / "annotations" / "instances_val2017.json")
    masks_only = [{key: value for key, value in result.items() if key != "bbox"} for result in found]
    again = COCOeval(truth, truth.loadRes(masks_only), "segm")
    again.evaluate()
    again.accumulate()
    again.summarize()
    assert again.stats.tolist() == pytest.approx(ours, abs=1e-4)

    saved = torch.load(tmp_path / "eval_masks.pth", weights_only=True)["precision"]
    assert torch.equal(saved, torch.from_numpy(evaluator.coco_eval["segm"].eval["precision"]))
    figure = precision_recall(evaluator, dataset.classes, "segm")
    assert f"AP {ours[0]:.3f}" in figure.legends[0].get_texts()[2].get_text()


def test_an_image_with_right_boxes_and_wrong_masks_is_among_the_worst(data, parse):
    dataset = build_dataset("val", parse(*TINY, "--coco_path", data, "--masks"))
    position = int(dataset.objects_per_image().argmax())
    found = {}
    for index, (image_id, (width, height)) in enumerate(zip(dataset.ids, dataset.records.sizes.tolist(), strict=True)):
        objects, masks = dataset.records.objects_of(index), dataset.records.masks_of(index, width, height)
        found[image_id] = {
            "scores": torch.ones(len(masks)),
            "labels": torch.from_numpy(objects.labels),
            "boxes": torch.from_numpy(objects.boxes + np.pad(objects.boxes[:, :2], ((0, 0), (2, 0)))),
            "masks": torch.from_numpy(1 - masks if index == position else masks),
        }
    ((worst, comparison),) = worst_images(evaluate(dataset, found, ("bbox", "segm")), dataset, 16)
    assert worst == position
    assert comparison.mistakes == 2 * len(comparison.missed) > 0


def test_the_command_line_writes_the_report(data, tmp_path, capsys):
    run(data, tmp_path)
    files = {"detections.json", "precision_recall.png", "worst", "eval.pth"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert "wrote detections.json, precision_recall.png and" in capsys.readouterr().out
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == set(range(1, 8))
    assert set(found[0]) == {"image_id", "category_id", "category_name", "bbox", "score"}
    assert {entry["category_id"] for entry in found} <= set(IDS.values())
    assert Image.open(tmp_path / "precision_recall.png").width > 800


def test_logits_that_stand_for_no_class_are_left_out(shapes, tmp_path):
    """Only three of the nine logits stand for a class, as COCO's ids have gaps."""
    run(shapes, tmp_path, "--num_classes", 9)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["category_id"] for entry in found} <= {1, 2, 3}
    assert len(found) < 7 * 72


def test_classes_that_the_data_does_not_have_keep_their_names(shapes, tmp_path):
    """The model has three classes, and the val file only one of them."""
    other = tmp_path / "coco"
    shutil.copytree(shapes, other)
    path = other / "annotations" / "instances_val2017.json"
    contents = json.loads(path.read_text())
    contents["categories"] = [{"id": 5, "name": "square"}]
    contents["annotations"] = [entry | {"category_id": 5} for entry in contents["annotations"]]
    path.write_text(json.dumps(contents))
    args = main.get_args_parser().parse_args([*TINY])
    args.num_classes = 3
    model = main.build_model(args)[0].state_dict()
    classes = Classes({0: "a", 1: 5, 2: "c"}, {0: "circle", 1: "square", 2: "triangle"})
    torch.save({"model": model, **classes.state_dict()}, tmp_path / "model.pth")
    run(other, tmp_path / "out", "--resume", tmp_path / "model.pth")
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = {(entry["category_id"], entry["category_name"]) for entry in found}
    assert names == {("a", "circle"), (5, "square"), ("c", "triangle")}


def test_the_worst_images_have_the_most_mistakes(dataset, tmp_path):
    """All scores are too low to count, except in an image without mistakes and in one with false detections only."""
    found = guesses(dataset)
    for prediction in found.values():
        prediction["scores"][:] = 0.4
    right, wrong = sorted(found, key=lambda i: -len(found[i]["scores"]))[:2]
    half = len(found[right]["scores"]) // 2
    truth = torch.tensor([entry["bbox"] for entry in dataset.coco.imgToAnns[right]])
    found[right]["boxes"][:half] = torch.cat([truth[:, :2], truth[:, :2] + truth[:, 2:]], 1)
    found[right]["scores"][:half] = 0.9
    found[wrong]["boxes"] += 500
    found[wrong]["scores"][:] = 0.9
    (tmp_path / "worst").mkdir()
    for name in ("16_99.jpg", "mine.jpg"):
        (tmp_path / "worst" / name).touch()
    write_report(evaluate(dataset, found), dataset, dataset.classes, tmp_path)

    mistakes = {i: len(dataset.coco.imgToAnns[i]) for i in found} | {right: 0}
    mistakes[wrong] += len(found[wrong]["scores"])
    expected = sorted((i for i in found if mistakes[i]), key=lambda i: (-mistakes[i], i))
    pictures = sorted(path.name for path in (tmp_path / "worst").iterdir())
    assert pictures == [*(f"{rank:02}_{i}.jpg" for rank, i in enumerate(expected, start=1)), "mine.jpg"]
    assert expected[0] == wrong
    picture = Image.open(tmp_path / "worst" / pictures[0])
    assert picture.width > 1.4 * picture.height


def test_a_report_needs_no_ground_truth_and_no_detections(data, dataset, parse, tmp_path):
    empty = tmp_path / "coco"
    shutil.copytree(data, empty)
    path = empty / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    run(empty, tmp_path / "out")
    assert (tmp_path / "out" / "precision_recall.png").stat().st_size > 1000
    assert list((tmp_path / "out").glob("worst/*")) == []

    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    evaluator = evaluate(dataset, dict.fromkeys(dataset.ids, nothing))
    write_report(evaluator, dataset, dataset.classes, tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert len(list((tmp_path / "worst").iterdir())) == sum(bool(dataset.coco.imgToAnns[i]) for i in dataset.ids)


def test_skipped_images_are_not_in_the_report(data, tmp_path):
    broken = tmp_path / "coco"
    shutil.copytree(data, broken)
    (broken / "images" / "val2017" / "000003.jpg").write_bytes(b"no image")
    (broken / "images" / "val2017" / "000005.jpg").unlink()
    run(broken, tmp_path / "out", "--on_bad_image", "skip")
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == {1, 2, 4, 6, 7}
    assert not list((tmp_path / "out" / "worst").glob("*_[35].jpg"))


def test_the_best_and_the_worst_of_many_classes_are_shown():
    """Names may contain characters that begin a formula in matplotlib."""
    categories = [{"id": i, "name": f"$class_{i}$ with a name of many words"} for i in range(1, 81)]
    images = [{"id": i} for i in range(1, 81)]
    boxes = [{"image_id": i, "category_id": i, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0} for i in range(1, 81)]
    truth = COCO()
    truth.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [b | {"id": b["image_id"]} for b in boxes],
    }
    truth.createIndex()
    evaluator = CocoEvaluator(truth, ["bbox"])
    for i in range(1, 81):
        box = torch.tensor([[0, 0, 10, 10 + i / 9]])
        evaluator.update({i: {"scores": torch.ones(1), "labels": torch.tensor([i]), "boxes": box}})
    evaluator.accumulate()
    figure = precision_recall(evaluator, Classes.from_categories(categories))
    _, bars = figure.axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert len(names) == MOST_BARS + 1
    assert names[0].startswith("$class_1$")
    assert names[-1].startswith("$class_80$")
    assert names[MOST_BARS // 2] == f".. {80 - MOST_BARS} more"
    assert max(map(len, names)) < 30
    aps = [text.get_text().split("AP ")[1] for text in figure.legends[0].get_texts()]
    assert float(aps[0]) == pytest.approx(
        evaluator.coco_eval["bbox"].eval["precision"][0, :, :, 0, -1].mean(), abs=1e-3
    )
    figure.canvas.draw()


def test_detections_for_the_test_server_are_written(data, tmp_path, capsys):
    run(data, tmp_path, "--image_set", "test")
    assert [path.name for path in tmp_path.iterdir()] == [TEST_FILE]
    found = json.loads((tmp_path / TEST_FILE).read_text())
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {entry["image_id"] for entry in found} == set(range(1, 8))
    assert {entry["category_id"] for entry in found} <= set(IDS.values())
    printed = capsys.readouterr().out
    assert "test:  7 images without annotations" in printed
    assert f"wrote {tmp_path / TEST_FILE}: zip it and upload it" in printed
    assert "Average" not in printed
    assert "loss" not in printed


def test_the_test_images_may_be_directly_in_the_data_folder(data, tmp_path):
    moved = tmp_path / "coco"
    shutil.copytree(data / "images" / "test2017", moved / "test2017")
    shutil.copytree(data / "annotations", moved / "annotations")
    run(moved, tmp_path / "out", "--image_set", "test")
    assert (tmp_path / "out" / TEST_FILE).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image_set", "test", "--output_dir", "x"), "--image_set test only writes detections: add --eval"),
        (("--image_set", "test", "--eval"), "--image_set test only writes detections: add --eval and --output_dir"),
        (("--image_set", "test", "--eval", "--output_dir", "x", "--overfit", 2), "without --overfit"),
    ],
)
def test_flags_that_do_not_fit_the_test_images_are_refused(flags, message, data, parse):
    with pytest.raises(InputError, match=message):
        main.main(parse(*TINY, "--coco_path", data, *flags))


def test_missing_test_files_are_named(shapes, data, tmp_path):
    with pytest.raises(InputError, match=r"no annotations/image_info_test-dev2017.json; it holds annotations/"):
        run(shapes, tmp_path, "--image_set", "test")
    with pytest.raises(
        InputError, match=r"no test data: name the folder with annotations/ and images/ with --coco_path$"
    ):
        main.main(
            main.get_args_parser().parse_args([*TINY, "--image_set", "test", "--eval", "--output_dir", str(tmp_path)])
        )
    listed = json.loads((data / "annotations" / "image_info_test-dev2017.json").read_text())
    val = tmp_path / "val.json"
    val.write_text(json.dumps(listed))  # only test images may come without annotations
    with pytest.raises(InputError, match="lists images without annotations"):
        run(data, tmp_path, "--val_annotations", val)


def test_two_processes_write_the_same_detections_as_one(data, tmp_path, run_on_two):
    flags = (*TINY, "--coco_path", data, "--batch_size", 1, "--eval", "--output_dir")
    runs = run_on_two(*flags, tmp_path / "two")
    assert [run.returncode for run in runs] == [0, 0], runs
    assert [run.stdout.count("wrote ") for run in runs] == [1, 0]
    run(data, tmp_path / "one", "--batch_size", 1)
    one, two = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("one", "two"))
    assert [entry["image_id"] for entry in one] == [entry["image_id"] for entry in two]
    assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in two], abs=1e-5)
