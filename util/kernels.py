"""Which kernels a run uses: the fast ones, or those that always compute the same."""

from __future__ import annotations

import os

import torch


def use_fast_kernels() -> None:
    """Matrix products of float32 in TF32 on GPUs, and attention without cuDNN.

    cuDNN plans its attention anew for every shape, and in training nearly every batch has a shape of its own.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_deterministic_kernels() -> None:
    """The same numbers from the same machine every time, also on GPUs, where sums otherwise depend on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
