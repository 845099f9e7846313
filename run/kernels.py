"""Which kernels a run uses: fast ones, compiled ones, or those that always compute the same."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def use_fast_kernels(device: torch.device) -> None:
    """On GPUs, matrix products of float32 in TF32, and attention without cuDNN.

    cuDNN plans its attention anew for every shape, and in training nearly every batch has a shape of its own.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)


def compile_model(model: nn.Module, **options: Any) -> None:
    """Compiles a model's transformer in place, so that its keys stay; `options` are those of `nn.Module.compile`.

    One compilation then serves images of all sizes, another those without padding. The backbone is left as it is: its
    convolutions would be compiled anew for every size, for minutes, and after eight sizes no more at all.
    """
    model.transformer.compile(dynamic=True, **options)


def use_deterministic_kernels() -> None:
    """The same numbers from the same machine every time, also on GPUs, where sums otherwise depend on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
