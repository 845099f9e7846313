"""OpenVINO computes the same from an exported file as PyTorch; the recipe of docs/onnx.md finds the same objects."""

import re

import numpy as np
import pytest
from PIL import Image

from datasets.images import read_image
from scripts import export_onnx
from scripts.detector import load_detector
from tests.conftest import ROOT
from tests.test_export_onnx import write_checkpoint

pytest.importorskip("openvino")

LOWEST = 0.05  # a threshold for scores, so low that the recipe prints many detections


def test_the_export_is_checked_and_the_recipe_prints_the_same_detections(tmp_path, monkeypatch, capsys):
    source = write_checkpoint(tmp_path / "checkpoint.pth", "--masks", "--min_size", 64, "--max_size", 100)
    command = ["--checkpoint", str(source), "--output", str(tmp_path / "model.onnx"), "--postprocess"]
    export_onnx.main([*command, "--check_with", "openvino"])
    lines = capsys.readouterr().out.splitlines()
    assert "between OpenVINO and PyTorch" in lines[0]
    assert sum("pred_masks" in line and "detections" in line for line in lines) == 6

    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)).save(photo)
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(recipe.replace("score >= 0.5", f"score >= {LOWEST}"), {})
    printed = re.findall(r"(\S+) (\w+) at (\S+) (\S+) (\S+) (\S+)", capsys.readouterr().out)
    detector = load_detector(str(source))
    (found,) = detector([read_image(photo).pixels])
    kept = found["scores"] >= LOWEST
    assert kept.sum() == 14
    assert [[float(score), *map(float, box)] for score, _, *box in printed] == [
        pytest.approx([score, *box], abs=0.06)
        for score, box in zip(found["scores"][kept].tolist(), found["boxes"][kept].tolist(), strict=True)
    ]
    assert [name for _, name, *_ in printed] == [detector.classes.names[i] for i in found["labels"][kept].tolist()]
