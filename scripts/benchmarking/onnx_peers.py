"""The benchmark's competitors for inference on CPUs: this code's models as ONNX files, in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch

from scripts.benchmarking.model import build, random_images
from scripts.benchmarking.peer import Runs
from scripts.export_onnx import ExportedModel, export
from scripts.onnx_runtimes import LOADERS, precisions

PRECISIONS = {"none": "f32", "bf16": "bf16"}  # by --amp; no other precision is measured on CPUs


def inference_of_runtime(runtime: str, variant: str, flags: argparse.Namespace, images: int) -> Runs:
    """Return predictions for a batch in the precisions that the runtime supports, with PyTorch's number of threads."""
    cpu = torch.device("cpu")
    model, _ = build(variant, cpu, "--no_aux_loss")
    contents = export(ExportedModel(model, None).eval())
    pixels = random_images(images, flags.size, cpu).numpy()
    inputs = {"images": pixels, "padding_mask": np.zeros((images, *flags.size), bool)}
    supported = precisions(runtime)
    return {
        amp: partial(LOADERS[runtime](contents, PRECISIONS[amp], torch.get_num_threads()), inputs)
        for amp in flags.amp
        if PRECISIONS.get(amp) in supported
    }
