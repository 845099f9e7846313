"""Which kernels a run uses: fast ones, compiled ones, or those that always compute the same."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import torch
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def use_fast_kernels(device: torch.device) -> None:
    """What makes this process fast on a device.

    GPUs: matrix products of float32 in TF32, and attention without cuDNN, which plans it anew for every shape; in
    training nearly every batch has a shape of its own. CPUs: see `keep_freed_memory`.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the C library use freed memory again, in blocks of up to 256 MB.

    glibc returns blocks of more than 32 MB to the system, which hands them out anew page by page, each filled with
    zeros first: a fifth of a training step's time. What the process has once used it then keeps to its end. Larger
    blocks, the attention tables of dilated models in training, would leave gaps that a third more memory goes into.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**28)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


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
