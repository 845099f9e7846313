"""Loading of batches: persistent workers, shared memory, and results that do not depend on the batch size."""

import gc
import json
import multiprocessing
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

import datasets.coco
from datasets import build_dataset, build_loader, get_coco_api_from_dataset
from datasets.coco_eval import CocoEvaluator
from datasets.samplers import same_shape_batches
from datasets.shapes import write_dataset
from engine import evaluate
from flags.parser import MAX_AUTO_WORKERS, get_args_parser
from models import build_model
from tests.forked import run_on_several
from tests.two_processes import join
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed import leave_process_group
from util.errors import InputError

SMALL = ("--min_size", 48, "--max_size", 80)


def test_persistent_workers_see_the_epoch(shapes, parse):
    """The same workers load every epoch, with the augmentation that the main process would choose."""
    args = parse("--coco_path", shapes, *SMALL, "--num_workers", 2)
    alone = parse("--coco_path", shapes, *SMALL, "--num_workers", 0)
    loaders = [build_loader(build_dataset("train", flags), flags, train=True) for flags in (args, alone)]
    others = set(multiprocessing.active_children())
    seen = []
    for epoch in range(3):
        for loader in loaders:
            loader.dataset.set_epoch(epoch)
            loader.sampler.set_epoch(epoch, start=epoch)
        epochs = [list(loader) for loader in loaders]
        for (samples, targets), (expected, expected_targets) in zip(*epochs, strict=True):
            assert torch.equal(samples.tensors, expected.tensors)
            for target, expected_target in zip(targets, expected_targets, strict=True):
                assert all(torch.equal(target[key], value) for key, value in expected_target.items())
        seen.append({process.pid for process in set(multiprocessing.active_children()) - others})
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2


def test_batches_are_channels_last_until_they_reach_the_device(shapes, parse):
    """On the device, the same batch has the usual layout, and its targets can be changed."""
    args = parse("--coco_path", shapes, *SMALL, "--num_workers", 1)
    for samples, targets in build_loader(build_dataset("val", args), args, train=False):
        assert samples.tensors.is_contiguous(memory_format=torch.channels_last)
        moved = samples.to("cpu")
        assert moved.tensors.is_contiguous()
        assert torch.equal(moved.tensors, samples.tensors)
        for target in targets:
            target["boxes"] += 1


def test_workers_have_one_thread(shapes, parse):
    args = parse("--coco_path", shapes, *SMALL, "--num_workers", 1)
    dataset = build_dataset("val", args)
    dataset.transforms = lambda image, target, rng: (image, target | {"threads": torch.tensor(torch.get_num_threads())})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = list(build_loader(dataset, args, train=False))
    finally:
        torch.set_num_threads(threads)
    assert all(target["threads"] == 1 for _, targets in batches for target in targets)


def test_a_data_set_keeps_its_ground_truth_only_as_arrays(shapes, parse):
    """Each evaluation makes a new one, which gives the same scores as the one that is read from the file."""
    dataset = build_dataset("val", parse("--coco_path", shapes, *SMALL))
    found = {}
    for i, image_id in enumerate(dataset.ids):
        objects = dataset.records.objects_of(i)
        boxes = torch.from_numpy(objects.boxes.copy())
        boxes[:, 2:] += boxes[:, :2]
        found[image_id] = {"scores": torch.ones(len(boxes)), "labels": torch.from_numpy(objects.labels), "boxes": boxes}
    stats = []
    for make in (dataset.ground_truth, lambda: get_coco_api_from_dataset(dataset)):
        evaluator = CocoEvaluator(make(), ["bbox"])
        evaluator.update(found)
        evaluator.accumulate()
        evaluator.summarize()
        stats.append(evaluator.coco_eval["bbox"].stats.tolist())
    assert stats[0] == stats[1]
    assert stats[0][0] == pytest.approx(1)
    reference = weakref.ref(dataset.ground_truth())
    gc.collect()
    assert reference() is None


def test_samples_are_made_from_arrays_only(shapes, parse):
    """Reading a Python object writes its reference count, so that a worker would copy memory that it shares."""
    dataset = build_dataset("train", parse("--coco_path", shapes, *SMALL))
    expected = dataset[3]
    dataset.coco = None
    image, target = dataset[3]
    assert torch.equal(image, expected[0])
    assert all(torch.equal(target[key], value) for key, value in expected[1].items())
    held = vars(dataset.records) | dataset.records.objects._asdict() | dataset.records._names._asdict()
    assert {type(value).__name__ for value in held.values()} <= {"ndarray", "Objects", "Names", "NoneType"}


@pytest.mark.parametrize(
    ("cpus", "processes", "workers"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 8, 1), (256, 8, MAX_AUTO_WORKERS)]
)
def test_auto_workers_shares_the_cpus_among_processes(cpus, processes, workers, monkeypatch, parse):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse("--num_workers", "auto").num_workers == workers
    assert parse("--num_workers", "3").num_workers == 3


def test_other_words_are_refused_as_number_of_workers(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--num_workers", "many")
    assert "--num_workers: invalid worker_count value: 'many'" in capsys.readouterr().err


SHAPES = [(4, 3), (3, 4), (4, 3), None, (4, 3), (3, 4), None, (4, 3)]


def test_each_batch_has_images_of_one_shape():
    assert same_shape_batches(SHAPES, 1) == [[0], [2], [4], [7], [1], [5], [3], [6]]
    assert same_shape_batches(SHAPES, 3) == [[0, 2, 4], [7], [1, 5], [3], [6]]
    assert same_shape_batches([], 3) == []


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_all_images_are_evaluated_by_some_process(processes):
    batches = same_shape_batches(SHAPES, 2)
    dealt = [list(DistributedSampler(batches, processes, rank, shuffle=False)) for rank in range(processes)]
    assert len({len(mine) for mine in dealt}) == 1
    assert {i for mine in dealt for number in mine for i in batches[number]} == set(range(len(SHAPES)))


@pytest.fixture
def photos(tmp_path):
    """Write a val split of nine images of three sizes, without objects; the size of the first is not annotated."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images = []
    for i in range(9):
        width, height = [(80, 60), (60, 80), (90, 50)][i % 3]
        Image.effect_noise((width, height), 20 * i + 20).convert("RGB").save(tmp_path / "val2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"} | ({"width": width, "height": height} if i else {}))
    annotate(tmp_path, {"images": images, "categories": [{"id": k} for k in range(4)], "annotations": []})
    return tmp_path


def annotate(root, data: dict) -> None:
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(data))


@pytest.fixture
def dc5(parse):
    """Build a small DC5 model with random weights, whose scores and boxes vary."""
    torch.manual_seed(0)
    flags = ("--backbone", "resnet50", "--dilation", "--hidden_dim", 64, "--nheads", 2, "--dim_feedforward", 64)
    flags += ("--enc_layers", 1, "--dec_layers", 2, "--num_queries", 30, "--num_classes", 4)
    model, criterion, postprocessors = build_model(parse(*flags))
    torch.nn.init.normal_(model.class_embed.weight, std=0.3)
    torch.nn.init.zeros_(model.class_embed.bias)
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.3)
    return model.eval(), criterion, postprocessors


def test_results_do_not_depend_on_the_batch_size(photos, dc5, parse):
    """Images of one batch are not padded, since padding changes what DC5 models predict."""
    model = dc5[0]

    def loader(batch_size: int):
        flags = ("--min_size", 64, "--max_size", 107, "--num_workers", 0, "--batch_size", batch_size)
        args = parse("--coco_path", photos, *flags)
        return build_loader(build_dataset("val", args), args, train=False)

    @torch.no_grad()
    def detect(batch_size: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for samples, targets in loader(batch_size):
            assert not samples.has_padding
            outputs = model(samples)
            for target, logits, boxes in zip(targets, outputs["pred_logits"], outputs["pred_boxes"], strict=True):
                found[int(target["image_id"])] = logits.sigmoid(), boxes
        return found

    assert (len(loader(1)), len(loader(4))) == (9, 4)
    alone, together = detect(1), detect(4)
    assert together.keys() == set(range(9))
    for image_id, predicted in alone.items():
        for expected, value in zip(predicted, together[image_id], strict=True):
            assert expected.std() > 0.1
            assert_close(value, expected, atol=1e-4, rtol=0)

    data = json.loads((photos / "annotations" / "instances_val2017.json").read_text())
    for image_id, (scores, boxes) in alone.items():  # about half of the detections are right
        width, height = Image.open(photos / "val2017" / f"{image_id}.png").size
        scale = torch.tensor([width, height, width, height])
        labels = (scores - scores.mean(0)).argmax(1)
        for box, k in zip(box_cxcywh_to_xyxy(boxes[::2]) * scale, labels[::2], strict=True):
            x1, y1, x2, y2 = (box + torch.randn(4)).tolist()
            annotation = {"image_id": image_id, "category_id": int(k), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            data["annotations"].append(annotation)
    annotate(photos, data)
    numbers = []
    for batch_size in (1, 4):
        data_loader = loader(batch_size)
        base_ds = get_coco_api_from_dataset(data_loader.dataset)
        stats, _ = evaluate(*dc5, data_loader, base_ds, torch.device("cpu"), "")
        numbers.append(stats["coco_eval_bbox"])
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    assert 0.1 < numbers[0][0] < 0.9


def read_together(rank: int, meeting: dict, root: Path, file: str) -> None:
    """Build a data set as one of two processes, of which only the first may read the annotations."""
    args = get_args_parser().parse_args(
        ["--device", "cpu", "--coco_path", str(root), "--val_annotations", str(root / file)]
    )
    join(rank, 2, meeting, args)
    if rank == 1:
        datasets.coco.load_annotations = int  # fails if it is called with a file
    try:
        dataset = build_dataset("val", args, share=True)
        result = (
            dataset.records.to_arrays(),
            dataset.classes,
            dataset.image_ids,
            list(dataset.ground_truth().anns.values()),
        )
    except InputError as error:
        result = str(error)
    torch.save(result, root / f"process{rank}.pth")
    leave_process_group()


def test_one_process_reads_the_annotations_for_all(tmp_path, parse, meeting):
    write_dataset(tmp_path, num_train=1, num_val=5)
    path = tmp_path / "annotations" / "instances_val2017.json"
    data = json.loads(path.read_text())
    for entry in (*data["images"], *data["annotations"]):
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = f"photo {entry[key]}"
    path.write_text(json.dumps(data))
    (tmp_path / "damaged.json").write_text("{")
    for file in ("annotations/instances_val2017.json", "damaged.json"):
        run_on_several(read_together, (meeting(), tmp_path, file), 2)
        results = [torch.load(tmp_path / f"process{rank}.pth", weights_only=False) for rank in range(2)]
        if file == "damaged.json":
            assert results[0] == results[1]
            assert "damaged.json: not JSON" in results[0]
            continue
        dataset = build_dataset("val", parse("--coco_path", tmp_path))
        assert dataset.image_ids[1] == "photo 1"
        for arrays, classes, image_ids, boxes in results:
            assert (classes, image_ids) == (dataset.classes, dataset.image_ids)
            for name, array in dataset.records.to_arrays().items():
                np.testing.assert_array_equal(arrays[name], array)
            whole = [entry | {"segmentation": None} for entry in dataset.coco.anns.values()]
            assert [entry | {"segmentation": None} for entry in boxes] == whole
