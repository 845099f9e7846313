"""The optimizer, AdamW as published, and the schedules of its learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from flags.resolve import Flags
from util.errors import InputError


def build_optimizer(model: nn.Module, lr: float, lr_backbone: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW for the trained parameters: group 0 without the backbone, group 1 the backbone; decay on both."""
    parameters: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters["backbone" in name].append(parameter)
    groups = [{"params": of_group, "lr": rate} for of_group, rate in zip(parameters, (lr, lr_backbone), strict=True)]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: str) -> None:
    """Restore the moments of a saved optimizer state; learning rates and decay stay those of this run.

    Raise InputError if the saved state belongs to other parameters.
    """
    state = optimizer.state_dict()
    here, there = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], saved["param_groups"])
    )
    if here != there:
        raise InputError(
            f"{source}: its run trained {there} tensors of transformer and backbone, this run would train {here}: "
            "use --lr_backbone 0 and --backbone_weights none in both runs or in neither"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in saved["state"].items():
        shape = parameters[number].shape if number < len(parameters) else None
        if moments["exp_avg"].shape != shape or moments["exp_avg_sq"].shape != shape:
            raise InputError(
                f"{source}: the optimizer's moments of parameter {number} do not have the shape of a trained weight"
            )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": state["param_groups"]})


def build_schedule(optimizer: torch.optim.Optimizer, flags: Flags, start_epoch: int = 0) -> LRScheduler:
    """Return the schedule of `--lr_schedule` at `start_epoch`; call `step()` after every epoch.

    The learning rates equal those of an uninterrupted run, bit for bit.

    step: the learning rates are multiplied by 0.1 after every `--lr_drop` epochs, as published.
    linear: in epoch n, counted from 0, the initial learning rates are multiplied by 1 - n / `--epochs`.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if flags.lr_schedule == "linear":
        return LambdaLR(optimizer, lambda epoch: max(1 - epoch / flags.epochs, 0), last_epoch=start_epoch - 1)
    for group in optimizer.param_groups:
        for _ in range(max(start_epoch - 1, 0) // flags.lr_drop):  # StepLR itself makes the drop at `start_epoch`
            group["lr"] *= 0.1
    return StepLR(optimizer, flags.lr_drop, last_epoch=start_epoch - 1)
