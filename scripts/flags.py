"""The flags of the tools in this folder.

This module is separate from the tools and imports nothing slow, so that --help and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flags.limits import check_device_name, check_numbers, check_texts, resolve_device
from flags.parser import check_args, get_args_parser, worker_count
from util.command import Parser, answer_early
from util.errors import InputError

VARIANTS = tuple(f"{model}{name}" for model in ("", "detr_") for name in ("r50", "r50dc5", "r101", "r101dc5"))
PARTS = ("counts", "operators", "inference", "training", "masks", "data", "evaluator")  # of the benchmark
RUNTIMES = ("onnxruntime", "openvino")  # packages that run ONNX files
FORMATS = ("transformers", "safetensors", "checkpoint")
CHECKPOINT = "a checkpoint, a URL or a hub entry's name"
MAX_DETECTIONS = "maximum number of detections per image; unset: as in the model's training"


def parse_flags(
    tool: str, argv: Sequence[str] | None = None, flags: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Return the flags of a tool; those already in `flags` are not set to their defaults.

    Raises:
        InputError: if a value is not valid for its flag.
    """
    parser = PARSERS[tool]()
    flags = parser.parse_args(argv, flags)
    if tool == "check_data":
        check_args(flags)
        return flags
    check_numbers(flags)
    check_texts({name: value for name, value in named(parser, flags) if name != "INPUT"})  # predict skips bad inputs
    check_device_name(getattr(flags, "device", "cpu"))
    if tool == "export_onnx" and flags.max_detections and not flags.postprocess:
        raise InputError("--max_detections: only --postprocess writes detections; add it, or drop the flag")
    return flags


def named(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the name of each flag as on the command line, and its value."""
    for action in parser._actions:
        if hasattr(flags, action.dest):
            name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
            yield name, getattr(flags, action.dest)


def check_early(tool: str) -> None:
    """Answer --help and refuse wrong flags before a tool's slow imports."""
    answer_early(lambda flags: parse_flags(tool, None, flags))


def parser_of(tool: str, description: str) -> Parser:
    """Return a parser that has no flags yet."""
    return Parser(
        prog=f"python -m scripts.{tool}",
        description=description,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device as in main.py."""
    parser.add_argument(
        "--device", default="auto", type=resolve_device, help="cuda, cuda:N, cpu, or auto: a GPU if there is one"
    )


def benchmark() -> Parser:
    """Return the flags of `scripts.benchmark`."""
    parser = parser_of("benchmark", "Measure the speed of the models, in turns with other installed software.")
    add = parser.add_argument
    add("--parts", nargs="+", default=[*PARTS], choices=PARTS, help="parts of the benchmark to run")
    add("--variants", nargs="+", default=["r50"], choices=VARIANTS, help="models to measure")
    add_device(parser)
    add("--size", nargs=2, type=int, default=(800, 1066), metavar=("HEIGHT", "WIDTH"), help="size of images")
    add("--images", nargs="+", type=int, default=[1], help="images per prediction")
    add("--batch_sizes", nargs="+", type=int, default=[2], help="images per training step")
    add("--group_detr", nargs="+", type=int, default=[1], help="groups of queries in a training step (Group DETR)")
    add("--amp", nargs="+", default=["none", "bf16"], choices=("none", "bf16", "fp16"), help="precisions")
    add("--compile", action="store_true", help="also measure compiled models")
    add("--no_peer", action="store_true", help="do not measure transformers, ONNX Runtime and OpenVINO")
    add("--repeats", type=int, default=5, help="number of measurements, whose median is reported")
    add("--json", help="file to which the numbers are written")
    return parser


def check_data() -> Parser:
    """Return the flags of `scripts.check_data`: those of main.py."""
    return Parser(
        "check_data",
        usage="python -m scripts.check_data --coco_path PATH [flags of main.py]",
        description="Check a data set before a training.",
        parents=[get_args_parser()],
    )


def convert() -> Parser:
    """Return the flags of `scripts.convert`."""
    parser = parser_of("convert", "Convert a model to another format; data that only training needs are left out.")
    add = parser.add_argument
    add("source", metavar="SRC", help="a checkpoint, .safetensors file, transformers folder, URL or hub name")
    add("target", metavar="DST", type=Path, help="target: a new file, or a new or empty folder")
    add(
        "--to",
        required=True,
        choices=FORMATS,
        default=argparse.SUPPRESS,
        help="a folder of Hugging Face transformers, a .safetensors file, or a .pth checkpoint",
    )
    return parser


def convergence() -> Parser:
    """Return the flags of `scripts.convergence`."""
    parser = parser_of("convergence", "Compare how fast models learn: a figure and tables of AP over epochs.")
    help_text = "folder with the runs in MODEL/seed*; the results are written there, too"
    parser.add_argument("--runs", default="output/convergence", type=Path, metavar="DIR", help=help_text)
    return parser


def demo_pictures() -> Parser:
    """Return the flags of `scripts.demo_pictures`."""
    parser = parser_of("demo_pictures", "Show predictions next to ground truth, and the curves of the run.")
    parser.add_argument("--output_dir", default="output/demo", type=Path, help="folder of the run")
    parser.add_argument("--threshold", default=0.3, type=float, help="lowest score that is drawn")
    return parser


def export_onnx() -> Parser:
    """Return the flags of `scripts.export_onnx`."""
    parser = parser_of("export_onnx", "Write a model as ONNX.")
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument("--output", default="model.onnx", type=Path, help="file to write")
    parser.add_argument("--postprocess", action="store_true", help="add scores, labels and boxes in pixels to it")
    parser.add_argument("--max_detections", default=None, type=int, help=MAX_DETECTIONS)
    parser.add_argument(
        "--check_with",
        nargs="+",
        default=[RUNTIMES[0]],
        choices=RUNTIMES,
        help="software whose outputs are compared with PyTorch's before the file is written",
    )
    return parser


def plot_attention() -> Parser:
    """Return the flags of `scripts.plot_attention`."""
    parser = parser_of(
        "plot_attention", "Draw the spatial, content and combined attention of every head of a decoder layer."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT)
    add(
        "--compare",
        default=None,
        metavar="CHECKPOINT",
        help="second model, whose attention to the same objects is drawn, too",
    )
    add("--image", required=True, type=Path, help="image file")
    add("--output", default="attention.png", type=Path, help="the picture to write; its suffix sets the format")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--top", default=3, type=int, metavar="N", help="draw the queries of the N best detections")
    which.add_argument("--queries", nargs="+", type=int, metavar="Q", help="draw these queries, counted from 0")
    add("--max_megapixels", default=100, type=int, help="largest image that is decoded, or JPEG at its full size")
    add(
        "--layer",
        default=-1,
        type=int,
        help="decoder layer, from 0, or backwards from -1; in layer 0, content includes positions",
    )
    add_device(parser)
    return parser


def plot_logs() -> Parser:
    """Return the flags of `scripts.plot_logs`."""
    parser = parser_of("plot_logs", "Draw the loss and AP curves of runs.")
    help_text = "--output_dir of a run, a log file, its URL, or the name of a hub entry of DETR for its published log"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help_text)
    parser.add_argument("--output", default="curves", type=Path, help="the pictures' path, without .png and .svg")
    return parser


def predict() -> Parser:
    """Return the flags of `scripts.predict`."""
    parser = parser_of("predict", "Find objects in images and videos, and show them in pictures and in a gallery.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, videos, folders, or patterns such as 'photos/*.jpg'")
    add("--checkpoint", required=True, help=CHECKPOINT)
    add("--output", required=True, type=Path, metavar="DIR", help="folder for detections, pictures and gallery")
    add("--threshold", default=0.3, type=float, help="lowest score in pictures, and at first in the gallery")
    add("--panoptic_threshold", default=None, type=float, help="lowest score of a segment; unset: the model's own")
    add("--annotations", default=None, metavar="FILE", help="COCO JSON file with image ids; images are not turned")
    add("--every", default=1, type=int, metavar="N", help="use every N-th frame of videos")
    add("--min_size", default=None, type=int, help="short side of resized images; unset: as in the model's training")
    add("--max_size", default=None, type=int, help="maximum long side; unset: as in the model's training")
    add("--max_detections", default=None, type=int, help=MAX_DETECTIONS)
    add("--max_megapixels", default=100, type=int, help="largest image that is decoded, or JPEG at its full size")
    add("--batch_size", default=4, type=int, help="images per forward pass")
    add("--amp", default="none", choices=("none", "bf16", "fp16"), help="precision of the model's forward pass")
    add_device(parser)
    add("--num_workers", default="auto", type=worker_count, help="threads that read and draw; auto: one per CPU")
    return parser


def replay() -> Parser:
    """Return the flags of `scripts.replay`."""
    parser = parser_of("replay", "Repeat a training step that was not finite.")
    parser.add_argument("dump", help="the nonfinite-*.pth file that the run wrote")
    add_device(parser)
    return parser


TOOLS = (
    benchmark,
    check_data,
    convergence,
    convert,
    demo_pictures,
    export_onnx,
    plot_attention,
    plot_logs,
    predict,
    replay,
)
PARSERS: dict[str, Callable[[], Parser]] = {tool.__name__: tool for tool in TOOLS}
