"""If weights without flags do not fit the default model, the error names the flags and the place to store them."""

import re

import pytest
import torch

from checkpoints.checkpoint import load_checkpoint, load_model_weights
from main import get_args_parser
from models import build_model
from scripts import convert, predict
from util.errors import InputError


def build(*flags: object) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(get_args_parser().parse_args([*map(str, flags), "--num_classes", "4"]))[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--num_queries 7",
        "--hidden_dim 64",
        "--enc_layers 0 --dec_layers 3",
        "--dim_feedforward 512",
        "--backbone resnet18",
        "--backbone resnet34",
        "--backbone resnet101",
        "--backbone_norm batch",
        "--position_embedding learned",
        "--enc_layers 2 --hidden_dim 32 --num_queries 8 --backbone resnet18 --backbone_norm batch",
    ],
)
@pytest.mark.parametrize("args", [{}, {"num_queries": 9}])
def test_the_error_names_the_flags_that_weights_need(flags, args):
    end = ": correct its args" if args else ": pass these, --nheads and --dilation to main.py"
    with pytest.raises(InputError, match=rf"^c\.pth does not fit the model: .* its weights need {flags}{end}") as error:
        load_model_weights(build(), {"model": build(*flags.split()).state_dict(), "args": args}, "c.pth")
    assert len(str(error.value)) < 500


def test_tools_say_where_to_store_flags(tmp_path):
    flags = {"backbone": "resnet18", "enc_layers": 1, "dec_layers": 1, "num_queries": 7, "dim_feedforward": 64}
    pairs = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    weights = {key: torch.zeros(tensor.shape) for key, tensor in build(*pairs).state_dict().items()}
    path, target = str(tmp_path / "c.pth"), str(tmp_path / "c.safetensors")
    torch.save(weights, path)
    advice = re.escape('or store them for all tools as {"model": weights, "args": {"hidden_dim": 256, ..}}')
    with pytest.raises(InputError, match=advice):
        convert.main([path, target, "--to", "safetensors"])
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=advice):
        predict.main(["--checkpoint", path, "--output", str(tmp_path), str(tmp_path / "photo.jpg"), "--device", "cpu"])
    torch.save({"model": weights, "args": flags}, path)
    convert.main([path, target, "--to", "safetensors"])
    assert load_checkpoint(target)["args"]["num_queries"] == 7
