"""A tiny model and images for the tests of prediction, and functions that read the predictions."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.shapes import draw_scene
from main import get_args_parser
from models import build_model

CLASSES = {0: (70, "disc"), 1: ("sq", "<b>square</b>")}  # label: category id, name
DETECTIONS = 16  # per image: 8 queries × 2 classes
ORIENTATION = 0x0112
HOSTILE = "</script><img src=x onerror=alert(1)>.jpg"
NAMES = ["a.jpg", "b.png", "tall.bmp", "sub/größe 猫.webp", f"sub/{HOSTILE}"]


def save_scored_checkpoint(path: Path, flags: list[str]) -> None:
    """Save a model whose scores are spread over 0 to 1."""
    torch.manual_seed(1)
    args = get_args_parser().parse_args([*flags, "--num_classes", str(len(CLASSES))])
    model, _, _ = build_model(args)
    torch.nn.init.normal_(model.class_embed.weight, std=0.9)
    model.class_embed.bias.data = torch.tensor([-1.5, 0])
    torch.nn.init.normal_(model.query_embed.weight, std=3)
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.2)
    ids, names = ({label: pair[i] for label, pair in CLASSES.items()} for i in (0, 1))
    torch.save({"model": model.state_dict(), "args": vars(args), "class_ids": ids, "class_names": names}, path)


def write_photos(root: Path) -> None:
    """Write images of several shapes and formats into two folders, and a file that is not an image."""
    for number, name in enumerate(("a.jpg", "b.png", f"sub/{HOSTILE}", "sub/größe 猫.webp", "sub/.hidden.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(root / name)
    scene(9).resize((40, 120)).save(root / "tall.bmp")
    (root / "notes.txt").write_text("not an image, not named like one")


def scene(number: int) -> Image.Image:
    return draw_scene(random.Random(number))[0]


def results_by_image(out: Path) -> dict[int | str, list[dict]]:
    """Return the results of detections.json by image id."""
    results = {}
    for result in json.loads((out / "detections.json").read_text()):
        results.setdefault(result["image_id"], []).append(result)
    return results


def page_data(out: Path) -> dict:
    page = (out / "index.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def assert_same(results: list[dict], expected: list[dict], tolerance: float = 2e-3) -> None:
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours["category_id"] == theirs["category_id"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=tolerance)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=tolerance)
