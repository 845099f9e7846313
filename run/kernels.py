"""Kernels of a run: fast ones, compiled ones, or deterministic ones."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch

from models.detector import Detector
from models.segmentation import DETRsegm

LARGEST_KEPT = 2**28  # bytes, the largest block of memory that is kept


def use_fast_kernels(device: torch.device) -> None:
    """Use TF32 for float32 matrix products, and attention without cuDNN, on GPUs.

    cuDNN plans its attention again for every shape, and in training nearly every batch has a different shape.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(device: torch.device) -> None:
    """Let a process that computes on a CPU keep the memory that it frees.

    This works with the C library of most Linux systems; elsewhere, and on other devices, nothing is done.

    A training step on a CPU frees and allocates gigabytes. Linux clears memory before it hands it out again, which
    takes a tenth of a step of Conditional DETR, and a third of one with 11 groups of queries. Blocks above
    `LARGEST_KEPT` are given back: the gaps that they would leave cost too much memory.
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # as in malloc.h
        libc.mallopt(m_trim_threshold, -1)  # never
        libc.mallopt(m_mmap_threshold, LARGEST_KEPT)


def compile_model(model: Detector | DETRsegm, **options: Any) -> None:
    """Compile a model's transformer in place, so that its keys stay; `options` are those of `nn.Module.compile`.

    One compilation then serves images of all sizes, and a second one serves batches without padding. The backbone is
    not compiled: its convolutions would be compiled again for every size, which takes minutes, and torch stops doing so
    after eight sizes.
    """
    model.detector.transformer.compile(dynamic=True, **options)


def use_deterministic_kernels() -> None:
    """Make a run reproducible on the same machine, also on GPUs, where sums otherwise depend on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
