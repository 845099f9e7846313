"""Commands of README and docs work: on generated images, and with tiny models named like the published ones."""

import json
import runpy
import sys
from fractions import Fraction
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from checkpoints import published
from datasets.shapes import write_dataset
from flags.parser import ParsedFlags, get_args_parser, parse_flags
from flags.resolve import MODEL_FLAGS
from main import main
from models import build_model
from scripts.prediction.video import write_video
from tests import predicting
from tests.conftest import ROOT, TINY
from tests.documents import PAGES, README, blocks, commands, flags_of_main, is_run, tool_of

for package in ("av", "onnx", "onnxruntime", "safetensors"):
    pytest.importorskip(package)

COCO = "/path/to/coco"  # in commands
WITH_COMMANDS = [page for page in PAGES if any(map(is_run, commands(page)))]
MODELS = {"checkpoint": (), "detector": (), "conditional_detr": (), "detr": ("--model", "detr")}


@pytest.fixture
def folder(tmp_path, shapes, trained, narrow, monkeypatch) -> Path:
    """Enter a folder that has all files that commands name."""
    monkeypatch.chdir(tmp_path)
    for name, flags in MODELS.items():
        save_model(tmp_path / f"{name}.pth", *flags)
    known = vars(get_args_parser().parse_args(TINY))
    entry = published.Published((tmp_path / "checkpoint.pth").as_uri(), {name: known[name] for name in MODEL_FLAGS})
    monkeypatch.setitem(published.PUBLISHED, "conditional_detr_resnet50", entry)
    monkeypatch.setitem(published.LOGS, "detr_resnet50", (trained / "log.txt").as_uri())
    links = {"output/demo/checkpoint.pth": tmp_path / "checkpoint.pth"}
    links |= dict.fromkeys(("output/first", "output/second"), trained)
    for split in ("train", "val"):
        images, annotations = f"images/{split}2017", f"annotations/instances_{split}2017.json"
        links |= dict.fromkeys((f"mine/{split}", f"coco/{images}"), shapes / images)
        links |= dict.fromkeys((f"mine/{split}.json", f"coco/{annotations}"), shapes / annotations)
    links |= {"coco/images/test2017": shapes / "images" / "val2017"}
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    write_dataset(tmp_path / "coco_panoptic", num_train=8, num_val=5, panoptic=True)  # its images are also in coco/
    listed = json.loads((tmp_path / "mine" / "val.json").read_text())
    del listed["annotations"]
    (tmp_path / "coco" / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(listed))
    for name in ("photo.jpg", "another.jpg", "photos/a.jpg", "more/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        predicting.scene(1).save(tmp_path / name)
    with write_video(tmp_path / "clip.mp4", Fraction(10), Fraction(1, 1000), (64, 48)) as write:
        write(predicting.scene(1).resize((64, 48)), Fraction(0), Fraction(1, 10))
    return tmp_path


def save_model(path: Path, *flags: str) -> None:
    args = get_args_parser().parse_args([*TINY, "--num_classes", "91", *flags])
    torch.save({"model": build_model(args)[0].state_dict(), "args": vars(args)}, path)


def run(command: list[str], folder: Path, monkeypatch) -> None:
    """Run a command in this process; training ends after one epoch."""
    words = [word.replace(COCO, str(folder / "coco")) for word in command]
    if tool := tool_of(words):
        flags = [*words[3:], *TINY] if tool == "check_data" else words[3:]
        assert not import_module(f"scripts.{tool}").main(flags), command
    elif flags := flags_of_main(words):
        main(parse_flags(get_args_parser(), [*flags, *TINY, "--epochs", "1"], ParsedFlags()))
    else:
        monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:]])
        runpy.run_path(sys.argv[0], run_name="__main__")
    for flag, value in pairwise(words):
        if flag in ("--output", "--output_dir"):
            assert Path(value).exists() or Path(f"{value}.png").exists(), command


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run(page, folder, monkeypatch):
    for command in filter(is_run, commands(page)):
        run(command, folder, monkeypatch)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "prediction.md"], ids=lambda page: page.name)
def test_examples_in_python_find_objects(page, folder):
    for code in blocks(page, "python"):
        names: dict = {}
        exec(code.replace('"."', repr(str(ROOT))), names)
        assert names["found"]["boxes"].shape == (100, 4)
