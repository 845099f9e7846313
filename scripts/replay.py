"""Repeat a training step that ended a run because it was not finite, and find the first module that is not finite.

Usage: python -m scripts.replay output/run/nonfinite-epoch0003-step000012-process0.pth
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("replay")

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.checkpoint import load_model_weights
from engine import to_device
from flags.limits import check_device
from flags.resolve import Flags, resolve
from models import build_model
from models.classification import Totals
from run.kernels import compile_model, use_deterministic_kernels, use_fast_kernels
from run.step import Step
from run.step_dump import load_dump
from util.command import run_command
from util.distributed import tensors_of
from util.errors import InputError
from util.logger import warn
from util.nested_tensor import NestedTensor
from util.rng import set_torch_rng_states

Dump = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parse_flags("replay", argv)
    check_device(flags.device)
    device = torch.device(flags.device)
    dump = load_dump(flags.dump)
    place = dump["place"]
    ids = [int(target["image_id"]) for *_, targets in dump["batches"] for target in targets]
    print(f"epoch {place['epoch']}, step {place['step']}, process {place['process']}, images {ids}")
    for line in limits_of(dump, device):
        print(f"note: {line}")
    losses, fault = repeat(dump, device, flags.dump)
    if missing := losses.keys() - dump["losses"].keys():
        raise InputError(f"{flags.dump}: not a step of the model in this file, since it has no {min(missing)}")
    recorded = {name: dump["losses"][name].to(value) for name, value in losses.items()}
    for name, value in losses.items():
        print(f"  {name} {value.item():g} (recorded: {recorded[name].item():g})")
    if different := [name for name, value in losses.items() if not is_same(value, recorded[name])]:
        warn(f"the replay differs from the run in {', '.join(different)}")
    else:
        print("all losses equal the recorded ones bit for bit")
    print(fault)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two scalars are equal bit for bit, or both NaN."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def limits_of(dump: Dump, device: torch.device) -> list[str]:
    """Return the reasons why the replay may not give exactly the recorded losses."""
    args, limits = dump["args"], []
    run_device = args["device"].partition(":")[0]
    if device.type != run_device:
        limits.append(
            f"the run was on --device {args['device']}, the replay is on {device}: sums are rounded differently"
        )
    if dump["processes"] > 1 and args.get("backbone_norm") == "batch" and run_device == "cuda":
        limits.append(f"batch norms used the images of {dump['processes']} processes, here only the images of one")
    return limits


def repeat(dump: Dump, device: torch.device, source: str) -> tuple[dict[str, Tensor], str]:
    """Repeat the step of a dump with the kernels, precision and flags of its run; `source` names the dump's file.

    Return the weighted losses, and a sentence about the first module or gradient that is not finite. The losses include
    the norm of the gradients, but only for a run of one process: the mean over several is not known here.
    """
    args = resolve(argparse.Namespace(**dump["args"]))
    torch.set_num_threads(dump["threads"])
    use_fast_kernels(device)
    if args.deterministic:
        use_deterministic_kernels()
    losses, fault = take_step(dump, args, device, source, look=not args.compile)
    if args.compile:  # compiled code has no modules to watch
        _, fault = take_step(dump, args, device, source, look=True)
    return losses, fault


def take_step(dump: Dump, args: Flags, device: torch.device, source: str, look: bool) -> tuple[dict[str, Tensor], str]:
    """Take the step up to its gradients and return the results of `repeat`; watch the model if `look`, else compile."""
    model, criterion, _ = build_model(args)
    load_model_weights(model, dump, source)
    model.to(device).train()
    outputs, gradients = watch(model) if look else ([], [])
    if not look:
        compile_model(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0)
    step = Step(model, criterion, optimizer, amp=args.amp)
    if step.scaler.is_enabled():
        step.scaler = torch.amp.GradScaler(device.type, init_scale=dump["scale"].item())
    batches = [to_device(NestedTensor(images, mask), targets, device) for images, mask, targets in dump["batches"]]
    set_torch_rng_states(dump["random"])
    per_image = [len(target["labels"]) for _, targets in batches for target in targets]
    losses = step.compute_gradients(batches, Totals(dump["num_boxes"].to(device), per_image))
    norm = step.clip_gradients()
    losses = {name: value.detach() for name, value in losses.items() if name in ("loss", *criterion.weight_dict)}
    if outputs:
        fault = f"the first module whose output is not finite: {outputs[0]}"
    elif not losses["loss"].isfinite():
        fault = "the outputs of all modules are finite: look at the targets"
    elif gradients:
        fault = f"all losses are finite; the first parameter whose gradient is not finite: {gradients[0]}"
    elif not norm.isfinite():
        fault = "all losses and gradients are finite, but the gradients are too large for their norm"
    else:
        fault = "all values are finite here" + "; replay the files of the other processes" * (dump["processes"] > 1)
    if dump["processes"] == 1:
        losses["gradient norm"] = norm
    return losses, fault


def watch(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return two lists, filled later: the modules whose outputs, and the parameters whose gradients, are not finite."""
    outputs: list[str] = []
    gradients: list[str] = []

    def look_at(name: str, tensor: Tensor, found: list[str]) -> None:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            found.append(name)

    def look_at_outputs(name: str, nest: Any) -> None:
        for tensor in tensors_of(nest):
            look_at(name, tensor, outputs)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, nest, name=name: look_at_outputs(name, nest))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: look_at(name, gradient, gradients))
    return outputs, gradients


if __name__ == "__main__":
    run_command(main)
