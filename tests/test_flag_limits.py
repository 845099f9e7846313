"""Numbers, paths and devices as flags: each value is accepted, or refused in one line that names the flag."""

import argparse
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from datasets import shapes
from flags.limits import BACKBONES, LIMITS, check_device, check_numbers, wrong_with
from flags.parser import ParsedFlags, check_args, parse_flags
from flags.resolve import given_flags, resolve
from main import get_args_parser
from models.backbone import CHANNELS
from scripts.detector import build_detector
from scripts.flags import PARSERS
from tests.conftest import ROOT
from util.errors import InputError

DEFAULTS = vars(get_args_parser().parse_args(["--device", "cpu"]))
ODD = (-1, 0, 1, 10**9, 2**63, 2**64, 10**400, 1e-300, math.nan, math.inf, -math.inf, True, "1", 1.5)
HUGE = {"lr_drop", "eval_every", "save_every", "skip_nonfinite", "overfit", "patience", "seed"}  # may be 10^9
TINY = {"dropout", "ema_decay", "weight_decay"}  # may be almost 0
HEAVY = ("torch", "torchvision", "numpy", "pycocotools", "scipy", "matplotlib", "PIL", "onnx", "transformers")


def numeric(parser: argparse.ArgumentParser) -> dict[str, type]:
    """Return the flags that take numbers, with their types; for "auto or a number", it is the type of a parsed 7."""
    kinds = {}
    for action in parser._actions:
        if action.type in (int, float):
            kinds[action.dest] = action.type
        elif action.type and not isinstance(action.type, type):
            try:
                kinds[action.dest] = type(action.type("7"))
            except ValueError:
                continue
    return {flag: kind for flag, kind in kinds.items() if kind in (int, float)}


@pytest.mark.parametrize("make", [get_args_parser, shapes.get_parser, *PARSERS.values()])
def test_every_numeric_flag_has_limits_and_a_default_within_them(make):
    parser = make()
    for flag, kind in numeric(parser).items():
        assert LIMITS[flag].kind is kind, f"--{flag} needs a row in LIMITS"
        default = parser.get_default(flag)
        for value in default if isinstance(default, list | tuple) else [default]:
            assert value in (None, "auto") or not wrong_with(value, LIMITS[flag])


@pytest.mark.parametrize("flag", sorted(numeric(get_args_parser())))
def test_odd_numbers_are_accepted_or_refused_in_one_line(flag):
    """Each is within the limits of its flag, or refused in one line; nothing else is raised."""
    for value in ODD:
        args = argparse.Namespace(**DEFAULTS | {flag: value})
        try:
            check_args(args)
        except InputError as error:
            assert f"--{flag}" in str(error)
            assert len(str(error)) < 200
        else:
            assert isinstance(value, int | float) and math.isfinite(value) and value >= 0
            assert value in (0, 1, 1.5) or flag in HUGE | TINY


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("lr", -1, "--lr -1: must be at least 0"),
        (
            "lr",
            1e-20,
            "--lr 1e-20: must be 0 or at least 1e-12 (AdamW changes each weight by about this much per step)",
        ),
        ("lr", math.inf, "--lr inf: must be a finite number"),
        ("epochs", 0, "--epochs 0: must be at least 1"),
        ("epochs", 2.0, "--epochs 2.0: must be an integer"),
        ("epochs", 10**400, "--epochs 1e400: must be between 1 and 1,000,000 (file names count epochs in six digits)"),
        ("seed", 2**64, "--seed 18446744073709551616: must be between 0 and 4,000,000,000"),
        ("set_cost_bbox", math.nan, "--set_cost_bbox nan: must be a finite number"),
        ("clip_max_norm", 1e-9, "--clip_max_norm 1e-09: must be 0 or at least 1e-06"),
        ("max_size", 700, "--max_size 700: must be at least --min_size 800"),
        ("nheads", 3, "--hidden_dim 256 must be a multiple of 4 and of --nheads 3"),
        ("hidden_dim", 258, "--hidden_dim 258 must be a multiple of 4"),
        ("dropout", 1.0, "--dropout 1: every activation would be dropped"),
        ("focal_alpha", 0, "--focal_alpha 0: must be at least 0.001"),
        ("backbone", "vgg", "--backbone vgg: choose one of resnet18, resnet34"),
        ("pre_norm", True, "--pre_norm: Conditional DETR's decoder has its norms after the residual sums"),
    ],
)
def test_messages_name_the_flag_its_value_and_the_limit(flag, value, message):
    with pytest.raises(InputError) as error:
        check_args(argparse.Namespace(**DEFAULTS | {flag: value}))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enc_layers": 100, "dec_layers": 100, "hidden_dim": 4096}, "a transformer of 31.9 billion weights"),
        ({"lr": 0, "lr_backbone": 0}, "--lr 0 with --lr_backbone 0: nothing would be trained"),
        ({"lr": 1, "weight_decay": 1}, "--weight_decay 1: its product with the learning rate must be less than 1"),
        ({f"set_cost_{name}": 0 for name in ("class", "bbox", "giou")}, "cannot all be 0"),
        ({f"{name}_loss_coef": 0 for name in ("cls", "bbox", "giou")}, "are all 0: nothing would be trained"),
        (
            {f"{name}_loss_coef": 0 for name in ("cls", "bbox", "giou")} | {"aux_loss": False},
            "nothing would be trained",
        ),
    ],
)
def test_flags_that_cannot_be_combined_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        check_args(argparse.Namespace(**DEFAULTS | flags))


def test_numbers_of_numpy_are_accepted():
    check_args(argparse.Namespace(**DEFAULTS | {"lr": np.float32(0.1), "batch_size": np.int64(3)}))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cpu:1", "cuda:99999", "gpu", "", "cuda:x", "cuda:-1"])
def test_unsupported_devices_are_refused(device):
    with pytest.raises(InputError, match=f"--device {device}: not a supported device; pass cuda, cuda:N or cpu"):
        check_args(argparse.Namespace(**DEFAULTS | {"device": device}))


def test_missing_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(InputError, match="--device cuda:2: torch sees 2 GPUs, counted from 0"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch sees no GPU here; pass --device cpu"):
        check_device("cuda")


@pytest.mark.parametrize("flag", [name for name, value in DEFAULTS.items() if value is None or isinstance(value, str)])
@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 5000])
def test_strings_that_cannot_be_paths_are_refused(flag, text):
    """Any flag refuses them; those of numbers and devices have other messages."""
    with pytest.raises(InputError, match=f"--{flag}") as error:
        check_args(argparse.Namespace(**DEFAULTS | {flag: text}))
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e999", "1" * 5000, "x", "", "1e9", "0x10"])
def test_odd_strings_end_in_one_line(text, capsys):
    for flag in ("--lr", "--batch_size"):
        try:
            check_args(get_args_parser().parse_args([f"{flag}={text}", "--device=cpu"]))
        except InputError as error:
            assert str(error).startswith(flag)
        except SystemExit as end:
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: argument {flag}: invalid ") and end.code == 2
        else:
            pytest.fail(f"{flag} {text} was accepted")


def test_given_flags_were_set_by_a_user_or_by_code():
    parser = get_args_parser()
    flags = parse_flags(parser, ["--backbone", "resnet50", "--dilation", "--device", "cpu"], ParsedFlags())
    assert given_flags(flags) == {"backbone", "dilation", "device"}
    assert "given" not in vars(flags)
    flags.nheads = 4  # by Python code
    assert "nheads" in given_flags(flags)
    flags = parser.parse_args(["--backbone", "resnet50", "--dilation"])  # as in a notebook
    assert given_flags(flags) == {"dilation", "device"}


def test_resolved_flags_are_complete_and_read_only():
    published = argparse.Namespace(backbone="resnet101", lr=1e-5, device="cpu")
    flags = resolve(published, num_queries=7)
    assert (flags.backbone, flags.lr, flags.num_queries, flags.backbone_norm) == ("resnet101", 1e-5, 7, "frozen")
    assert flags.given == {"backbone", "lr", "device"}
    assert vars(published).keys() == {"backbone", "lr", "device"}
    with pytest.raises(AttributeError, match="flags are read-only"):
        flags.lr = 1
    assert resolve(flags, lr=2).given == flags.given


def test_checkpoints_with_flags_that_make_no_model_are_refused():
    """The message names the file, and no huge model is built."""
    for flag, value in (
        ("enc_layers", 10**9),
        ("hidden_dim", 4.5),
        ("nheads", 0),
        ("backbone", "vgg"),
        ("min_size", -1),
    ):
        stored = {"model": {"class_embed.bias": torch.zeros(4)}, "args": {flag: value}}
        with pytest.raises(InputError, match=rf"^c.pth: --{flag} {value}: "):
            build_detector(stored, "c.pth")


@pytest.mark.parametrize("flags", [("--train", "0"), ("--val", "-1"), ("--seed", "-1"), ("--output", "x" * 999)])
def test_flags_of_generated_data_are_checked(flags, tmp_path):
    with pytest.raises(InputError, match=flags[0]):
        shapes.main(["--output", str(tmp_path), *flags])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output .*file: cannot be written"):
        shapes.main(["--output", str(tmp_path / "file")])


def test_flags_accept_all_backbones_of_models():
    assert set(BACKBONES) == set(CHANNELS)


@pytest.fixture
def run_light(tmp_path):
    """Run a program with a Python in which every slow import fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(tmp_path)},
            check=False,
        )

    return run


def test_main_prints_help_and_errors_before_slow_imports(run_light):
    done = run_light("main.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--coco_path" in done.stdout
    for flags, message in (
        (("--lr", "nan"), "error: --lr nan: must be a finite number"),
        (("--lr", "x"), "error: argument --lr: invalid float value: 'x'; --help lists the flags"),
        (("--no_such_flag",), "error: unrecognized arguments: --no_such_flag; --help lists the flags"),
        (("--device", "mps"), "error: --device mps: not a supported device; pass cuda, cuda:N or cpu"),
        (("--resume", "auto"), "error: --resume auto looks for checkpoints in --output_dir: add that flag"),
    ):
        done = run_light("main.py", *flags)
        assert done.returncode
        assert done.stderr.splitlines() == [message]


def test_help_shows_defaults_of_flags_with_values_only():
    text = " ".join(get_args_parser().format_help().split())
    assert "(default: 50)" in text
    for misleading in ("(default: True)", "(default: False)", "(default: None)", "(default: )"):
        assert misleading not in text  # for switches (--no_aux_loss stores False) and unset flags


@pytest.mark.parametrize("tool", [f"scripts.{tool}" for tool in sorted(PARSERS)])
def test_tools_print_help_before_slow_imports(tool, run_light):
    done = run_light("-m", tool, "--help")
    assert done.returncode == 0, done.stderr
    assert tool in done.stdout


def test_generating_data_does_not_wait_for_torch(run_light, tmp_path):
    (tmp_path / "PIL.py").unlink()  # the tool draws with it, and it is imported quickly
    done = run_light("-m", "datasets.shapes", "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tool", sorted(PARSERS))
def test_tools_refuse_odd_numbers(tool):
    """Flags that take several numbers check each of them."""
    for flag, kind in numeric(PARSERS[tool]()).items():
        for value in (kind(-9999), 2**64, 10**400, math.nan, -math.inf):
            flags = argparse.Namespace(**{flag: [1, value] if flag in ("queries", "batch_sizes", "images") else value})
            with pytest.raises(InputError, match=rf"--{flag} (-9999|1844|1e400|nan|-inf).*: must be "):
                check_numbers(flags)


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        ("predict", ("--checkpoint", "x", "--output", "y", "z", "--every", "0"), "--every 0: must be at least 1"),
        (
            "predict",
            ("--checkpoint", "x", "--output", "y", "z", "--device", "xpu"),
            "--device xpu: not a supported device",
        ),
        ("predict", ("--checkpoint", "x", "--output", "y" * 999, "z"), "--output yyy"),
        (
            "plot_attention",
            ("--checkpoint", "x", "--image", "y", "--queries", "3", "-1"),
            "--queries -1: must be at le",
        ),
        ("benchmark", ("--size", "800", "1"), "--size 1: must be at least 32"),
        ("benchmark", ("--repeats", "0"), "--repeats 0: must be at least 1"),
        ("demo_pictures", ("--threshold", "nan"), "--threshold nan: must be a finite number"),
        ("check_data", ("--batch_size", "0"), "--batch_size 0: must be at least 1"),
        ("replay", ("dump.pth", "--device", "meta"), "--device meta: not a supported device"),
        ("convert", ("a" * 999, "b", "--to", "checkpoint"), "SRC aaa"),
    ],
)
def test_tools_refuse_flags_before_slow_imports(tool, flags, message, run_light):
    done = run_light("-m", f"scripts.{tool}", *flags)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
