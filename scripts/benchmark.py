"""Measure the speed of the models, compared with this machine's limits and with other software that is installed.

Usage:
    python -m scripts.benchmark                       # everything, for the R50 model
    python -m scripts.benchmark --parts counts        # parameters and multiply-adds of all models, in seconds
    python -m scripts.benchmark --variants r50 r50dc5 r101 r101dc5 --parts inference --json speed.json

Since the speed of machines varies, all competitors run in turns, and medians are shown. Competitors are Hugging Face
`transformers` (R50) and, on CPUs, the models' ONNX files in ONNX Runtime and OpenVINO. Weights and images are random.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("benchmark")

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flags.limits import check_device
from run.kernels import compile_model, keep_freed_memory, use_fast_kernels
from scripts.benchmarking.data import measure_data, measure_evaluator
from scripts.benchmarking.masks import measure_masks
from scripts.benchmarking.model import PRECISIONS, PUBLISHED, TrainingStep, build, inference, random_images
from scripts.benchmarking.onnx_peers import inference_of_runtime
from scripts.benchmarking.operators import count_operators
from scripts.benchmarking.peer import (
    PACKAGES,
    PeerRun,
    inference_of_transformers,
    installed_version,
    peer_runs,
    training_of_transformers,
)
from scripts.benchmarking.timing import alternate, peak_mib
from scripts.onnx_runtimes import TITLES
from util.command import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parse_flags("benchmark", argv)
    check_device(flags.device)
    device = torch.device(flags.device)
    use_fast_kernels(device)
    keep_freed_memory(device)

    machine = describe_machine(device, flags.amp)
    if not flags.no_peer:
        machine["others"] = {peer: installed_version(peer) or "not installed" for peer in PACKAGES}
    print(json.dumps(machine, indent=1), flush=True)
    report: dict[str, Any] = {"machine": machine}
    for part in flags.parts:
        report[part] = []
        measured = (PARTS[part](variant, flags, machine) for variant in flags.variants)
        for rows in measured if part in PARTS else [OTHER_PARTS[part](flags)]:
            print_table(rows)
            report[part] += rows
    if flags.json:
        Path(flags.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def describe_machine(device: torch.device, precisions: list[str]) -> dict[str, Any]:
    """Return the hardware and versions that the numbers depend on, and the measured rates of large matrix products."""
    names = [line for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    size = 8192 if device.type == "cuda" else 2048
    rates = {}
    for name in (PRECISIONS[amp] for amp in precisions):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = alternate({"": partial(torch.matmul, a, b)}, device, repeats=9)[""]
        rates[name] = round(2e-9 * size**3 / seconds, 1)
    return {
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} usable",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matmul GFLOP/s": rates,
    }


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table, without columns that have no values."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if any(row.get(name) for row in rows)]
    cells = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells), flush=True)


def count_gflop(variant: str, size: tuple[int, int]) -> float:
    """Return GFLOP per image: 2 × multiply-adds / 10⁹, counted in training mode, whose operators have known costs."""
    meta = torch.device("meta")  # tensors with shapes but without values, so that nothing is computed
    model, _ = build(variant, meta)
    model.train().requires_grad_(True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_images(1, size, meta))
    return counter.get_total_flops() / 1e9


def count_parameters(model: nn.Module) -> float:
    """Return the number of parameters in millions, with the buffers of the frozen norms, as published."""
    return sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6


def count_models(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return parameters and multiply-adds per image of all models, next to the published numbers."""
    rows = []
    for variant, (parameters, multiply_adds) in PUBLISHED.items():
        model, _ = build(variant, torch.device("meta"))
        rows.append(
            {
                "model": variant,
                "parameters M": round(count_parameters(model), 1),
                "published parameters M": parameters,
                "multiply-adds G": round(count_gflop(variant, flags.size) / 2, 1),
                "published multiply-adds G": multiply_adds,
            }
        )
    return rows


def peak(run: Callable[[], Any], device: torch.device) -> float | None:
    return run.peak_mib() if isinstance(run, PeerRun) else peak_mib(run, device)


def measure_inference(variant: str, flags: argparse.Namespace, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the time of predictions by number of images and precision, in turns with other software."""
    return [row for images in flags.images for row in measure_predictions(variant, images, flags, machine)]


def measure_predictions(
    variant: str, images: int, flags: argparse.Namespace, machine: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure predictions for batches of one size."""
    device = torch.device(flags.device)
    models = {"": build(variant, device, "--no_aux_loss")[0].eval()}
    gflop = count_gflop(variant, flags.size)
    parameters = count_parameters(models[""])
    if flags.compile:
        models[" compiled"] = build(variant, device, "--no_aux_loss")[0].eval()
        compile_model(models[" compiled"])
    pixels = random_images(images, flags.size, device)
    prepared = ", prepared" if device.type == "cpu" else ""  # on GPUs, the model itself
    models[prepared] = models[""].prepared()
    runs = {(amp, kind): inference(model, pixels, amp) for amp in flags.amp for kind, model in models.items()}
    if "none" in flags.amp:
        runs["none", ", attention weights in full"] = sdpa_kernel(SDPBackend.MATH)(runs["none", ""])
    if "bf16" in flags.amp:  # with these weights, forward passes need no conversion
        converted = build(variant, device, "--no_aux_loss")[0].eval().bfloat16()
        runs["bf16", f", weights in bfloat16{prepared}"] = inference(converted.prepared(), pixels, "none")
    makers = {"transformers": inference_of_transformers}
    makers |= {runtime: partial(inference_of_runtime, runtime, variant) for runtime in TITLES}
    with ExitStack() as processes:
        for peer, make in makers.items():
            theirs = processes.enter_context(peer_runs(peer, variant, make, flags, images))
            runs |= {(amp, f" {TITLES.get(peer, peer)}"): run for amp, run in theirs.items()}
        times = alternate(runs, device, flags.repeats)
        return [
            {
                "model": variant + kind,
                "precision": PRECISIONS[amp],
                "images": images,
                "parameters M": round(parameters, 1),
                "GFLOP per image": round(gflop, 1),
                "ms": round(1e3 * seconds, 2),
                "images/s": round(images / seconds, 2),
                "of matmul rate": round(images * gflop / seconds / machine["matmul GFLOP/s"][PRECISIONS[amp]], 3),
                "speed relative to OpenVINO": round(times.get((amp, " OpenVINO"), 0) / seconds, 2),
                "peak MiB": peak(runs[amp, kind], device),
            }
            for (amp, kind), seconds in times.items()
        ]


def measure_training(variant: str, flags: argparse.Namespace, _machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure training steps by batch size and precision, in turns with `transformers`, and the time of their parts."""
    device = torch.device(flags.device)
    rows = []
    for batch_size in flags.batch_sizes:
        with peer_runs("transformers", variant, training_of_transformers, flags, batch_size) as peers:
            for amp in flags.amp:
                rows += measure_step(variant, flags, batch_size, amp, peers.get(amp), device)
    return rows


def measure_step(
    variant: str,
    flags: argparse.Namespace,
    batch_size: int,
    amp: str,
    peer: Callable[[], None] | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measure training steps of one batch size and precision."""
    steps = {
        f", {groups} groups" if groups > 1 else "": TrainingStep(
            *build(variant, device, "--group_detr", str(groups)), batch_size, amp, flags
        )
        for groups in flags.group_detr
    }
    if flags.compile:
        model, criterion = build(variant, device)
        compile_model(model)
        steps[" compiled"] = TrainingStep(model, criterion, batch_size, amp, flags)
    runs: dict[str, Callable[[], None]] = {**steps, **({" transformers": peer} if peer else {})}
    return [
        {
            "model": variant + kind,
            "precision": PRECISIONS[amp],
            "batch": batch_size,
            "ms": round(1e3 * seconds, 1),
            "images/s": round(batch_size / seconds, 2),
            "peak MiB": peak(runs[kind], device),
        }
        | (steps[kind].split(flags.repeats) if kind in steps else {})
        for kind, seconds in alternate(runs, device, flags.repeats).items()
    ]


PARTS = {
    "inference": measure_inference,
    "training": measure_training,
    "masks": measure_masks,
}
OTHER_PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "counts": count_models,
    "operators": count_operators,
    "data": lambda flags: measure_data(flags.repeats),
    "evaluator": lambda flags: measure_evaluator(flags.repeats),
}

if __name__ == "__main__":
    run_command(main)
