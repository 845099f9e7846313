"""Repeat the training step that ended a run because it was not finite, and find the first module that is not.

Usage: python -m scripts.replay output/run/nonfinite-epoch0003-step000012-process0.pth
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, for which Python looks for modules in scripts/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("replay")

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine import autocast, logged_losses, sum_of_losses, to_device
from models import build_model
from util.args import get_args_parser
from util.checkpoint import load_model_weights
from util.command import run_command
from util.errors import InputError
from util.flag_limits import check_device
from util.kernels import use_deterministic_kernels, use_fast_kernels
from util.nested_tensor import NestedTensor
from util.rng import set_torch_rng_states
from util.step_dump import load_dump


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    flags = parse_flags("replay", argv)
    check_device(flags.device)
    dump = load_dump(flags.dump)
    place, batches = dump["place"], dump["batches"]
    ids = [int(target["image_id"]) for *_, targets in batches for target in targets]
    print(f"epoch {place['epoch']}, step {place['step']}, process {place['process']}, images {ids}")
    for line in limits_of(dump, torch.device(flags.device)):
        print(f"note: {line}")
    losses, first = repeat(dump, torch.device(flags.device), flags.dump)
    if missing := losses.keys() - dump["losses"].keys():
        raise InputError(f"{flags.dump}: not the dump of this model's step, it has no {min(missing)}")
    recorded = {name: dump["losses"][name].to(value.device) for name, value in losses.items()}
    for name, value in losses.items():
        print(f"  {name} {value.item():g} (recorded: {recorded[name].item():g})")
    same = all(torch.equal(value.nan_to_num(), recorded[name].nan_to_num()) for name, value in losses.items())
    print("all losses equal the recorded ones bit for bit" if same else "some losses differ from the recorded ones")
    print(first or "the outputs of all modules are finite: look at the targets")


def limits_of(dump: dict[str, Any], device: torch.device) -> list[str]:
    """Return the reasons why the replay may not give exactly the recorded losses."""
    args, limits = dump["args"], []
    if device.type != args["device"].partition(":")[0]:
        limits.append(
            f"the run was on --device {args['device']}, the replay is on {device}: sums are rounded differently"
        )
    if args.get("compile"):
        limits.append("the run was compiled, the replay is not, so that it can look into every module")
    if dump["processes"] > 1 and args.get("backbone_norm") == "batch" and device.type == "cuda":
        limits.append(f"batch norms saw the images of {dump['processes']} processes, here they see those of one")
    return limits


def repeat(dump: dict[str, Any], device: torch.device, source: str = "the dump") -> tuple[dict[str, Tensor], str]:
    """Repeat the forward pass of a dumped step with the kernels, precision and flags of its run.

    Returns the weighted losses, and the first module whose output is not finite ("" if there is none).
    """
    args = get_args_parser().parse_args([], argparse.Namespace(**dump["args"]))
    use_fast_kernels(device)
    if args.deterministic:
        use_deterministic_kernels()
    model, criterion, _ = build_model(args)
    load_model_weights(model, dump, source)
    model.to(device).train()
    failing: list[str] = []

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                failing.append(f"the first output that is not finite is that of {name}")

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(check(name))
    set_torch_rng_states(dump["random"])
    batches = [to_device(NestedTensor(images, mask), targets, device) for images, mask, targets in dump["batches"]]
    num_boxes = dump["num_boxes"].to(device)
    parts = []
    for samples, targets in batches:
        with autocast(device, args.amp):
            outputs = model(samples)
        parts.append(logged_losses(criterion(outputs, targets, num_boxes), criterion.weight_dict))
    losses = sum_of_losses(parts)
    return {name: value for name, value in losses.items() if name in criterion.weight_dict}, (failing or [""])[0]


if __name__ == "__main__":
    run_command(main)
