"""Numbers, paths and devices on the command line: each value is useful, or refused in one line that names the flag."""

import argparse
import math
import sys

import pytest
import torch

from main import get_args_parser
from tests.conftest import ROOT
from util.args import check_args, given_flags, parse_flags
from util.errors import InputError
from util.flag_limits import LIMITS, number

UNCHECKED = {"mask_loss_coef", "dice_loss_coef", "local_rank", "world_size"}  # not supported, or set by a launcher
DEFAULTS = vars(get_args_parser().parse_args(["--device", "cpu"]))
NUMBERS = [
    action.dest
    for action in get_args_parser()._actions
    if action.type in (int, float) or (isinstance(DEFAULTS.get(action.dest), int) and action.nargs != 0)
]
VALUES = (-1, 0, 1, 10**9, 2**63, 2**64, 10**400, math.nan, math.inf, -math.inf)


def test_every_numeric_flag_has_limits():
    assert set(NUMBERS) == set(LIMITS)


@pytest.mark.parametrize("flag", sorted(set(LIMITS) - UNCHECKED))
def test_odd_numbers(flag):
    """Each is within the limits of its flag, or refused; nothing else is raised."""
    least, most = LIMITS[flag]
    for value in VALUES:
        args = argparse.Namespace(**DEFAULTS | {flag: value})
        if least <= value <= most:
            assert math.isfinite(value)
            continue
        with pytest.raises(InputError) as error:
            check_args(args)
        assert str(error.value).startswith(f"--{flag} ")
        assert "must be" in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e999", "1" * 5000, "x", ""])
def test_odd_texts_end_in_one_line(text, capsys):
    for flag, kind in (("--lr", "float"), ("--batch_size", "int")):
        try:
            check_args(get_args_parser().parse_args([f"{flag}={text}", "--device=cpu"]))
        except InputError as error:
            assert str(error).startswith(flag)
        except SystemExit:
            assert f"argument {flag}: invalid {kind} value" in capsys.readouterr().err
        else:
            pytest.fail(f"{flag} {text} was accepted")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cpu:1", "cuda:99999", "gpu", "", "cuda:x"])
def test_devices(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=f"--device {device}"):
        check_args(argparse.Namespace(**DEFAULTS | {"device": device}))
    check_args(argparse.Namespace(**DEFAULTS | {"device": "cuda:1"}))


@pytest.mark.parametrize("flag", ["coco_path", "output_dir", "resume", "train_images", "dist_url"])
def test_nul_bytes(flag):
    with pytest.raises(InputError, match=f"--{flag} .*NUL byte"):
        check_args(argparse.Namespace(**DEFAULTS | {flag: "a\0b"}))


def test_numbers_of_tools():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--every", type=number(1, 100))
    parser.add_argument("--threshold", type=number(0, 1, float))
    assert parser.parse_args(["--every", "7", "--threshold", "0.5"]).threshold == 0.5
    for arguments in (["--every", "0"], ["--every", "101"], ["--threshold", "nan"], ["--threshold=-inf"]):
        with pytest.raises(argparse.ArgumentError, match=r"argument --\w+: .* must be"):
            parser.parse_args(arguments)


def test_given_flags():
    parser = get_args_parser()
    flags = parse_flags(parser, ["--backbone", "resnet50", "--dilation", "--device", "cpu"])
    assert given_flags(flags) == {"backbone", "dilation", "device"}
    assert "given" not in vars(flags)
    flags = parser.parse_args(["--backbone", "resnet50", "--dilation"])  # as a notebook has it
    assert given_flags(flags) == {"dilation"}


def test_help_needs_no_heavy_import(tmp_path):
    """`main.py --help` must not wait for torch and its friends."""
    import subprocess

    for name in ("torch", "torchvision", "numpy", "pycocotools", "scipy", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--help"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--coco_path" in done.stdout
