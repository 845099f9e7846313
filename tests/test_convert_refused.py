"""Conversions that are refused before anything is written."""

import sys
from pathlib import Path

import pytest
import torch

from checkpoints.checkpoint import load_checkpoint
from scripts.convert import main
from tests.conftest import TINY
from tests.converting import OWN_CLASSES, save
from util.errors import InputError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "c.pth", *TINY, num_classes=3, **OWN_CLASSES)


@pytest.mark.parametrize(
    ("to", "target", "message"),
    [
        ("transformers", "full", "full: exists already"),
        ("transformers", "file", "file: exists already"),
        ("safetensors", "taken.safetensors", "taken.safetensors: exists already"),
        ("safetensors", "m.pth", r"m.pth: --to safetensors writes a file, name it \*.safetensors"),
        ("checkpoint", "m.safetensors", r"--to checkpoint writes a file, name it \*.pth"),
    ],
)
def test_nothing_is_overwritten(to, target, message, tiny, tmp_path):
    (tmp_path / "full" / "inside").mkdir(parents=True)
    for name in ("file", "taken.safetensors"):
        (tmp_path / name).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        main([str(tiny), str(tmp_path / target), "--to", to])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_transformers_does_not_support_is_refused(tmp_path):
    path = save(tmp_path / "c.pth", *TINY, "--dec_layers", 1)
    with pytest.raises(InputError, match="one decoder layer"):
        main([str(path), str(tmp_path / "folder"), "--to", "transformers"])
    assert not (tmp_path / "folder").exists()


def test_metadata_of_other_programs_is_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    for args in ("{", "[1]"):
        save_file({"class_embed.bias": torch.zeros(3)}, tmp_path / "m.safetensors", {"args": args, "class_ids": args})
        with pytest.raises(
            InputError, match=r"m.safetensors: (its metadata was not written by scripts.convert|args is)"
        ):
            load_checkpoint(tmp_path / "m.safetensors")


def test_flags_of_another_model_are_refused_before_anything_is_written(tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True)
    torch.save(checkpoint | {"args": checkpoint["args"] | {"enc_layers": 2}}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="does not fit the model"):
        main([str(tmp_path / "c.pth"), str(tmp_path / "m.safetensors"), "--to", "safetensors"])
    assert not (tmp_path / "m.safetensors").exists()


def test_safetensors_is_an_extra(tiny, tmp_path, monkeypatch):
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"needs safetensors: pip install safetensors"):
        main([str(tiny), str(tmp_path / "m.safetensors"), "--to", "safetensors"])
