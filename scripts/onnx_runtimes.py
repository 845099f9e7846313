"""Runtimes of ONNX files on CPUs, by the names of their packages: ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]  # by the names of inputs or outputs
Compute = Callable[[Arrays], Arrays]  # outputs from inputs

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def load_onnxruntime(contents: bytes, _precision: str = "f32", threads: int = 0) -> Compute:
    """Return a function that runs an ONNX file's contents in ONNX Runtime, in the precision of the file.

    Args:
        threads: number of threads; 0: ONNX Runtime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise, its threads keep the CPU busy for up to a second after a run, while the benchmark measures others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def load_openvino(contents: bytes, precision: str = "f32", threads: int = 0) -> Compute:
    """Return a function that runs an ONNX file's contents in OpenVINO.

    Args:
        precision: f32, or bf16 on CPUs that support it; on CPUs with AMX, OpenVINO alone would choose bf16.
        threads: number of threads; 0: OpenVINO's choice.
    """
    core = openvino_core()
    properties = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    model = core.compile_model(core.read_model(contents), "CPU", properties)
    return lambda inputs: {output.any_name: array for output, array in model(inputs).items()}


def openvino_core() -> Any:
    """Return OpenVINO's entry point, which is missing from its type information."""
    return import_module("openvino").Core()


def precisions(runtime: str) -> set[str]:
    """Return the precisions that a runtime supports on this machine."""
    if runtime == "onnxruntime":
        return {"f32"}
    supported = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"f32", "bf16"} if "BF16" in supported else {"f32"}


LOADERS: dict[str, Callable[..., Compute]] = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}
