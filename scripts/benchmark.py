"""Measures how fast the models are here, beside what this machine can do and beside Hugging Face `transformers`.

Usage:
    python -m scripts.benchmark                       # everything, for the R50 model
    python -m scripts.benchmark --variants r50 r50dc5 r101 r101dc5 --parts inference --json speed.json

Competitors take turns, and medians are shown: machines are noisy. Weights are random, images too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import autocast, logged_losses
from main import get_args_parser
from models import build_model
from scripts.benchmark_data import measure_data, measure_evaluator
from scripts.timing import alternate, synchronize
from util.command import run_command
from util.kernels import use_fast_kernels
from util.nested_tensor import NestedTensor
from util.optim import build_optimizer

VARIANTS = {
    "r50": (),
    "r50dc5": ("--dilation",),
    "r101": ("--backbone", "resnet101"),
    "r101dc5": ("--backbone", "resnet101", "--dilation"),
}
PRECISIONS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by --amp
NUM_CLASSES = 91
BOXES = 7  # an image, about as many as COCO has


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*PARTS, *HOST_PARTS], choices=[*PARTS, *HOST_PARTS])
    parser.add_argument("--variants", nargs="+", default=["r50"], choices=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[2], help="images of a training step")
    parser.add_argument("--amp", nargs="+", default=["none", "bf16"], choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true", help="also measure compiled models")
    parser.add_argument("--no_peer", action="store_true", help="without transformers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    device = torch.device(flags.device)
    if device.type == "cuda":
        use_fast_kernels()

    machine = describe_machine(device, flags.amp)
    print(json.dumps(machine, indent=1), flush=True)
    report: dict[str, Any] = {"machine": machine}
    for part in flags.parts:
        report[part] = []
        measured = (PARTS[part](variant, flags, machine) for variant in flags.variants)
        for rows in measured if part in PARTS else [HOST_PARTS[part](flags.repeats)]:
            print_table(rows)
            report[part] += rows
    if flags.json:
        Path(flags.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def describe_machine(device: torch.device, precisions: list[str]) -> dict[str, Any]:
    """What the numbers depend on, and the measured rates of large matrix products."""
    names = [line for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    size = 8192 if device.type == "cuda" else 2048
    rates = {}
    for name in (PRECISIONS[amp] for amp in precisions):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = alternate({"": lambda a=a, b=b: a @ b}, device, repeats=9)[""]
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


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """The most GPU memory that a run adds to what is there before it, in MiB; None on CPUs."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as Markdown; columns without a value are left out."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if any(row.get(name) for row in rows)]
    cells = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells), flush=True)


def build(variant: str, device: torch.device, *more: str) -> tuple[nn.Module, nn.Module]:
    """A variant's model and criterion with random weights."""
    flags = ["--device", str(device), "--num_classes", str(NUM_CLASSES), *VARIANTS[variant], *more]
    model, criterion, _ = build_model(get_args_parser().parse_args(flags))
    return model.to(device), criterion


def build_peer(variant: str, flags: argparse.Namespace) -> nn.Module | None:
    """The model of Hugging Face `transformers`, doing the same work; None where it is not installed or has no such."""
    if flags.no_peer or variant != "r50":
        return None
    try:
        from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig
    except ImportError:
        return None
    config = ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage4"]),
        num_labels=NUM_CLASSES,
        auxiliary_loss=True,
        activation_dropout=0.1,
        attention_dropout=0.1,
    )
    model = ConditionalDetrForObjectDetection(config)
    for name, parameter in model.named_parameters():
        if "backbone" in name:  # as it comes it trains none of the backbone; the recipe trains the last three stages
            parameter.requires_grad_(any(f"stages.{i}" in name for i in (1, 2, 3)))
    return model.to(flags.device)


def random_images(images: int, size: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 3, *size), dtype=torch.uint8, generator=generator).to(device)


def random_targets(images: int, device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(1, NUM_CLASSES, (BOXES,), generator=generator).to(device),
            "boxes": (torch.rand(BOXES, 4, generator=generator) * 0.3 + 0.3).to(device),
        }
        for _ in range(images)
    ]


def count_gflop(variant: str, size: tuple[int, int], device: torch.device) -> float:
    """Multiply-adds of an image × 2 / 10⁹, counted as a model computes in training: with operators that are known."""
    model, _ = build(variant, device)
    model.train().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_images(1, size, device))
    return counter.get_total_flops() / 1e9


def measure_inference(variant: str, flags: argparse.Namespace, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Latency of one image by precision, in turns with `transformers`."""
    device = torch.device(flags.device)
    models = {"": build(variant, device, "--no_aux_loss")[0].eval()}
    gflop = count_gflop(variant, flags.size, device)
    parameters = sum(tensor.numel() for tensor in models[""].state_dict().values())
    if flags.compile:
        models[" compiled"] = build(variant, device, "--no_aux_loss")[0].eval()
        models[" compiled"].compile()
    if peer := build_peer(variant, flags):
        models[" transformers"] = peer.eval()
    image = random_images(1, flags.size, device)

    def infer(model: nn.Module, inputs: Tensor, amp: str) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), autocast(device, amp):
                model(inputs)

        return run

    runs = {
        (amp, kind): infer(model, image / 255 if kind == " transformers" else image, amp)
        for amp in flags.amp
        for kind, model in models.items()
    }
    if "bf16" in flags.amp:  # weights that no forward pass has to convert
        converted = build(variant, device, "--no_aux_loss")[0].eval().bfloat16()
        runs["bf16", " in bfloat16"] = infer(converted, image, "none")
    return [
        {
            "model": variant + kind,
            "precision": PRECISIONS[amp],
            "parameters M": round(parameters / 1e6, 1),
            "GFLOP": round(gflop, 1),
            "ms": round(1e3 * seconds, 2),
            "images/s": round(1 / seconds, 2),
            "of matmul rate": round(gflop / seconds / machine["matmul GFLOP/s"][PRECISIONS[amp]], 3),
            "peak MiB": peak_mib(runs[amp, kind], device),
        }
        for (amp, kind), seconds in alternate(runs, device, flags.repeats).items()
    ]


class TrainingStep:
    """A step of the recipe on a batch of random images of one size."""

    def __init__(
        self, model: nn.Module, criterion: nn.Module | None, batch_size: int, amp: str, flags: argparse.Namespace
    ) -> None:
        self.device = torch.device(flags.device)
        self.model = model.train()
        self.criterion = criterion
        self.amp = amp
        self.optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
        images = random_images(batch_size, flags.size, self.device)
        self.samples = NestedTensor(images, images.new_zeros(images[:, 0].shape, dtype=torch.bool), has_padding=False)
        self.targets = random_targets(batch_size, self.device)

    def __call__(self) -> None:
        self.update(self.loss(self.forward()))

    def forward(self) -> dict[str, Any]:
        with autocast(self.device, self.amp):
            return self.model(self.samples)

    def matching(self, outputs: dict[str, Any]) -> None:
        """What `loss` begins with."""
        layers = [outputs, *outputs["aux_outputs"]]
        self.criterion.matcher(
            *(torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes")), self.targets
        )

    def loss(self, outputs: dict[str, Any]) -> Tensor:
        return logged_losses(self.criterion(outputs, self.targets), self.criterion.weight_dict)["loss"]

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.step()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def split(self, repeats: int) -> dict[str, float]:
        """The median milliseconds of the parts, with a wait for the device behind each."""
        times: dict[str, list[float]] = {}

        def timed(name: str, part: Callable[..., Any], *inputs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = part(*inputs)
            synchronize(self.device)
            times.setdefault(f"{name} ms", []).append(1e3 * (time.perf_counter() - start))
            return result

        for _ in range(repeats):
            outputs = timed("forward", self.forward)
            timed("matching", self.matching, outputs)
            loss = timed("matching and losses", self.loss, outputs)
            self.optimizer.zero_grad()
            timed("backward", loss.backward)
            timed("clip and AdamW", self.step)
        return {name: round(median(values), 1) for name, values in times.items()}


class PeerStep(TrainingStep):
    """The same by `transformers`, whose model computes its losses itself."""

    def __call__(self) -> None:
        images, mask = self.samples.decompose()
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in self.targets]
        with autocast(self.device, self.amp):
            loss = self.model(pixel_values=images / 255, pixel_mask=~mask, labels=labels).loss
        self.update(loss)

    def split(self, repeats: int) -> dict[str, float]:
        return {}


def measure_training(variant: str, flags: argparse.Namespace, _machine: dict[str, Any]) -> list[dict[str, Any]]:
    """A training step by batch size and precision, in turns with `transformers`, and where its time goes."""
    device = torch.device(flags.device)
    rows = []
    for batch_size in flags.batch_sizes:
        for amp in flags.amp:
            steps = {"": TrainingStep(*build(variant, device), batch_size, amp, flags)}
            if flags.compile:
                steps[" compiled"] = TrainingStep(*build(variant, device), batch_size, amp, flags)
                steps[" compiled"].model.compile()
            if peer := build_peer(variant, flags):
                steps[" transformers"] = PeerStep(peer, None, batch_size, amp, flags)
            for kind, seconds in alternate(steps, device, flags.repeats).items():
                row = {
                    "model": variant + kind,
                    "precision": PRECISIONS[amp],
                    "batch": batch_size,
                    "ms": round(1e3 * seconds, 1),
                    "images/s": round(batch_size / seconds, 2),
                    "peak MiB": peak_mib(steps[kind], device),
                }
                rows.append(row | steps[kind].split(flags.repeats))
    return rows


PARTS = {
    "inference": measure_inference,
    "training": measure_training,
}
HOST_PARTS = {"data": measure_data, "evaluator": measure_evaluator}

if __name__ == "__main__":
    run_command(main)
