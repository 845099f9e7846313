"""Benchmarks of the CPU's work in a run: loading images, and scoring detections."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.coco_index import index
from datasets.transforms import make_coco_transforms, resized_size
from models.detector import IMAGENET_MEAN, IMAGENET_STD
from scripts.benchmarking.timing import alternate
from util.nested_tensor import collate_fn

WIDTH, HEIGHT = 640, 480  # like most photos of COCO
BATCH_SIZE = 2
OBJECTS, DETECTIONS = 7, 100  # per image
NUM_CATEGORIES = 80


def random_coco(rng: np.random.Generator, images: int) -> dict[str, Any]:
    """Return random annotations of images in COCO's instance format."""
    annotations = []
    for number in range(images * OBJECTS):
        x, y, width, height = (*rng.uniform(0, 300, 2), *rng.uniform(20, 180, 2))
        annotations.append(
            {
                "id": number + 1,
                "image_id": number // OBJECTS + 1,
                "category_id": int(rng.integers(1, NUM_CATEGORIES + 1)),
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": str(k + 1)} for k in range(NUM_CATEGORIES)],
    }


def write_photos(folder: Path, rng: np.random.Generator, images: int) -> None:
    """Write JPEG files with edges and noise, which have about as many bytes as photos."""
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (HEIGHT, WIDTH, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def loading_runs(folder: Path, images: int, split: str) -> dict[str, Callable[[], None]]:
    """Return runs that load all images of a folder in batches: this code's, and PIL's up to normalised floats."""
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(random_coco(np.random.default_rng(0), images)), encoding="utf-8")
    dataset = CocoDetection(folder, annotations, make_coco_transforms(split))
    augment = augment_by_pil if split == "train" else resize_by_pil
    rng = random.Random(0)

    def load_by_pil(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = augment(Image.open(folder / f"{index}.jpg").convert("RGB"), rng)
        return F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), {}

    def load(sample: Callable[[int], tuple[Tensor, dict[str, Tensor]]]) -> Callable[[], None]:
        def run() -> None:
            for first in range(0, images, BATCH_SIZE):
                collate_fn([sample(i) for i in range(first, min(first + BATCH_SIZE, images))])

        return run

    return {"": load(dataset.__getitem__), " PIL": load(load_by_pil)}


def augment_by_pil(image: Image.Image, rng: random.Random) -> Image.Image:
    """Apply the recipe's flip, resize and crop to an image without boxes."""
    sizes = range(480, 801, 32)
    if rng.random() < 0.5:
        image = F.hflip(image)
    if rng.random() < 0.5:
        return resize_by_pil(image, rng, sizes)
    image = resize_by_pil(image, rng, (400, 500, 600), None)
    width, height = (rng.randint(min(384, side), min(600, side)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return resize_by_pil(F.crop(image, top, left, height, width), rng, sizes)


def resize_by_pil(
    image: Image.Image, rng: random.Random, sizes: Sequence[int] = (800,), max_size: int | None = 1333
) -> Image.Image:
    width, height = resized_size(*image.size, rng.choice(sizes), max_size)
    return F.resize(image, [height, width])


def scoring_runs(rng: np.random.Generator, images: int) -> dict[str, Callable[[], None]]:
    """Return runs that score random detections: this code's, all at the end, and pycocotools' image by image."""
    truth = index(random_coco(rng, images))
    corners = torch.from_numpy(rng.uniform(0, 300, (images, DETECTIONS, 2)))
    boxes = torch.cat([corners, corners + torch.from_numpy(rng.uniform(20, 180, (images, DETECTIONS, 2)))], dim=-1)
    labels = torch.from_numpy(rng.integers(1, NUM_CATEGORIES + 1, (images, DETECTIONS)))
    scores = torch.from_numpy(rng.uniform(0, 1, (images, DETECTIONS)))
    detections_of = {i + 1: {"boxes": boxes[i], "labels": labels[i], "scores": scores[i]} for i in range(images)}

    def ours() -> None:
        evaluator = CocoEvaluator(truth, ("bbox",))
        evaluator.update(detections_of)
        evaluator.synchronize_between_processes()
        evaluator.accumulate()

    def image_by_image() -> None:
        matches = []  # [images, classes · areas]
        for image_id, detections in detections_of.items():
            x1, y1, x2, y2 = detections["boxes"].unbind(-1)
            columns = torch.stack([x1, y1, x2 - x1, y2 - y1, detections["scores"]], dim=-1).tolist()
            coco_results = [
                {"image_id": image_id, "category_id": label, "bbox": column[:4], "score": column[4]}
                for label, column in zip(detections["labels"].tolist(), columns, strict=True)
            ]
            with contextlib.redirect_stdout(io.StringIO()):
                evaluator = COCOeval(truth, truth.loadRes(coco_results), "bbox")
                evaluator.params.imgIds = [image_id]
                evaluator.evaluate()
            matches.append(evaluator.evalImgs)
        total = COCOeval(truth, iouType="bbox")
        total.params.imgIds = list(detections_of)
        total._paramsEval = total.params
        total.evalImgs = [of_image for of_class in zip(*matches, strict=True) for of_image in of_class]
        with contextlib.redirect_stdout(io.StringIO()):
            total.accumulate()

    return {"": ours, " pycocotools": image_by_image}


def measure_data(repeats: int) -> list[dict[str, Any]]:
    """Measure loading of batches of 640×480 JPEGs on one core, in turns with PIL up to normalised floats."""
    images, rows = 16, []
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), np.random.default_rng(0), images)
        for split in ("train", "val"):
            runs = loading_runs(Path(folder), images, split)
            with one_thread():
                seconds = alternate(runs, torch.device("cpu"), repeats)
            rows += [
                {"images": split + kind, "images/s and core": round(images / value, 1)}
                for kind, value in seconds.items()
            ]
    return rows


def measure_evaluator(repeats: int) -> list[dict[str, Any]]:
    """Measure scoring of 1,000 images with 100 detections each, in turns with pycocotools image by image."""
    runs = scoring_runs(np.random.default_rng(0), images=1000)
    seconds = alternate(runs, torch.device("cpu"), min(repeats, 3))
    return [{"scoring 1,000 × 100": f"boxes{kind}", "s": round(value, 2)} for kind, value in seconds.items()]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with a single thread, as loading processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
