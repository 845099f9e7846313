"""torch.hub entries, from another folder and without the training's libraries."""

import os
import subprocess
import sys

import pytest
import torch

import hubconf
from tests.conftest import ROOT
from tests.reference import DATA, reference_weights

SCRIPT = """
import sys
for name in ("pycocotools", "matplotlib", "tqdm", "termcolor"):
    sys.modules[name] = None  # as if not installed
import torch
model, postprocess = torch.hub.load({repo!r}, "conditional_detr_resnet50", source="local", return_postprocessor=True)
outputs = model([torch.zeros(3, 64, 96, dtype=torch.uint8)])
assert set(outputs) == {{"pred_logits", "pred_boxes"}}
print(len(postprocess(outputs, torch.tensor([[64, 96]]))[0]["scores"]))
"""


def test_from_any_folder_without_the_training_libraries(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(repo=str(ROOT))],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "100"


@pytest.mark.parametrize("entry", ["resnet50", "resnet50_dc5", "resnet101", "resnet101_dc5"])
def test_entries(entry):
    model = getattr(hubconf, f"conditional_detr_{entry}")(num_classes=7)
    lines = (DATA / f"state_dict_keys_{entry.removesuffix('_dc5')}.txt").read_text().splitlines()
    assert list(model.state_dict()) == [line.split()[0] for line in lines]
    assert model.class_embed.out_features == 7
    assert not model.training
    images = torch.zeros(1, 3, 64, 64)
    features, _, _ = model.backbone(images, torch.zeros(1, 64, 64, dtype=torch.bool))
    assert features.shape[-1] == (4 if "dc5" in entry else 2)


def test_pretrained_weights_come_from_the_published_address(tmp_path, monkeypatch):
    asked = []
    weights = reference_weights(hubconf.conditional_detr_resnet50().state_dict())

    def download(url, target, **_):
        asked.append(url)
        torch.save({"model": weights}, target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = hubconf.conditional_detr_resnet50_dc5(pretrained=True)
    assert torch.equal(model.query_embed.weight, weights["query_embed.weight"])
    assert asked == [
        "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/ConditionalDETR_r50dc5_epoch50.pth"
    ]
    with pytest.raises(ValueError, match="num_classes=7"):
        hubconf.conditional_detr_resnet50(pretrained=True, num_classes=7)
