"""Export a model to ONNX, after checking that ONNX Runtime or OpenVINO computes the same outputs as PyTorch.

    python -m scripts.export_onnx --checkpoint CKPT|conditional_detr_resnet50 --output model.onnx [--postprocess]
        [--check_with onnxruntime openvino]

The file takes uint8 images, which it normalises itself, and their padding mask, with any batch size, height and width.
Its metadata give the names and ids of the classes and the expected image size. `scripts/onnx_example.py` runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("export_onnx")

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from models import detector
from models.folded_norms import FoldedBody, FoldedConv2d, norm_terms
from models.postprocess import PostProcess
from models.segmentation import DETRsegm
from scripts.detector import Detector, load_detector
from scripts.onnx_runtimes import LOADERS, TITLES, Compute
from util.command import need, run_command
from util.errors import InputError
from util.files import replacing
from util.nested_tensor import NestedTensor

OPSET = 17  # the first version with LayerNormalization
FOLDED = "folded_weight", "folded_bias"  # names of initializers, by which quantizers find weights
# Tolerance of logits, scores, and boxes relative to the image, since runtimes add numbers in another order. The norms
# amplify rounding: PyTorch's own logits differ from its logits in float64 by up to 6e-5.
TOLERANCE = 1e-3
BATCH_SIZES = (1, 2)
SIZES = ((96, 128), (104, 112), (165, 131))  # height and width

PAPERS = {
    "conditional_detr": "Meng et al., Conditional DETR for Fast Training Convergence, ICCV 2021",
    "detr": "Carion et al., End-to-End Object Detection with Transformers, ECCV 2020",
}
DOCUMENTATION = {
    "images": "uint8 RGB [B, 3, H, W], resized to the metadata's min_size and max_size; normalised inside",
    "padding_mask": "[B, H, W], True where an image is padded, at its right and bottom, to the batch's size",
    "target_sizes": "[B, 2], the (height, width) of the original images, to which the boxes refer",
    "pred_logits": "[B, Q, K]; scores of labels are the sigmoids, or in DETR the softmax without the last, no object",
    "pred_boxes": "[B, Q, 4], (centre x, centre y, width, height) relative to the image without padding",
    "pred_masks": "[B, Q, H / 4, W / 4], logits of the queries' masks, for the padded image",
    "scores": "[B, N], the highest of all queries and labels in descending order, or in DETR of each query",
    "labels": "[B, N]; the metadata's class_names and class_ids describe them",
    "boxes": "[B, N, 4], (x1, y1, x2, y2) in pixels of target_sizes, not clipped",
}


class ExportedModel(nn.Module):
    """Model in the form that is exported: inputs and outputs are tensors, and the padding mask is always used."""

    def __init__(self, model: detector.Detector | DETRsegm, postprocess: PostProcess | None) -> None:
        super().__init__()
        self.model = model
        self.postprocess = postprocess
        fix_folded_weights(model)
        self.inputs = ["images", "padding_mask"]
        self.predictions = ["pred_logits", "pred_boxes"]
        if isinstance(model, DETRsegm):
            model.all_masks = True
            self.predictions += ["pred_masks"]
        self.outputs = [*self.predictions]
        if postprocess:
            self.inputs += ["target_sizes"]
            self.outputs += ["scores", "labels", "boxes"]

    def forward(self, images: Tensor, padding_mask: Tensor, *target_sizes: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 [B, 3, H, W], bool [B, H, W] and, with postprocessing, int64 [B, 2] as `DOCUMENTATION` says."""
        predicted = self.model(NestedTensor(images, padding_mask))
        outputs = tuple(predicted[name] for name in self.predictions)
        return (*outputs, *self.postprocess.batched(predicted, *target_sizes)[:3]) if self.postprocess else outputs


@torch.no_grad()
def fix_folded_weights(model: nn.Module) -> None:
    """Compute the weights of convolutions with folded norms once, so that the file contains only the results."""
    for body in model.modules():
        if not isinstance(body, FoldedBody):
            continue
        convolutions = (module for module in body.modules() if isinstance(module, FoldedConv2d))
        terms_of_norms = norm_terms(body, body.conv1.weight.dtype).values()
        for conv, terms in zip(convolutions, terms_of_norms, strict=True):  # both in the order of modules
            for name, tensor in zip(FOLDED, conv.fold(*terms), strict=True):
                conv.register_buffer(name, tensor)
            conv.fold = partial(_kept, conv)  # type: ignore[method-assign]  # of this copy of the model alone


def _kept(conv: FoldedConv2d, *_terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias that `fix_folded_weights` has computed."""
    return attrgetter(*FOLDED)(conv)


def example_inputs(batch_size: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images [B, 3, H, W], masks with more padding from image to image, and sizes [B, 2]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch_size, 3, height, width), dtype=torch.uint8, generator=generator)
    padding = torch.zeros(batch_size, height, width, dtype=torch.bool)
    for i in range(batch_size):
        padding[i, height // (i + 1) :] = True
        padding[i, :, width - i * width // 4 :] = True
    return images, padding, torch.tensor([[480, 640]]).expand(batch_size, -1)


def nearest_neighbours(graph: Any, x: Any, size: Any, *_scales: Any) -> Any:
    """Compute `interpolate(mode="nearest")` with the same indices as PyTorch.

    ONNX's Resize divides by the inverse of the ratio; for some sizes, its rounding selects the neighbouring pixel.
    """

    def constant(value: float, dtype: torch.dtype) -> Any:
        return graph.op("Constant", value_t=torch.tensor(value, dtype=dtype))

    zero, one = constant(0, torch.float32), constant(1, torch.float32)
    for axis, length in enumerate(size.node().inputs(), start=2):
        old = graph.op("Gather", graph.op("Shape", x), constant(axis, torch.int64))
        old, new = (graph.op("Cast", n, to_i=torch.onnx.TensorProtoDataType.FLOAT) for n in (old, length))
        positions = graph.op("Mul", graph.op("Range", zero, new, one), graph.op("Div", old, new))
        indices = graph.op("Cast", graph.op("Floor", positions), to_i=torch.onnx.TensorProtoDataType.INT64)
        x = graph.op("Gather", x, indices, axis_i=axis)
    return x


def export(exported: ExportedModel) -> bytes:
    """Return the contents of the ONNX file, without documentation.

    This uses the tracing exporter, which all versions of PyTorch since 2.6 have; the newer exporter fails on older
    versions.
    """
    free = {"images": {0: "batch", 2: "height", 3: "width"}, "padding_mask": {0: "batch", 1: "height", 2: "width"}}
    free["pred_masks"] = {0: "batch", 2: "mask_height", 3: "mask_width"}
    names = [*exported.inputs, *exported.outputs]
    torch.onnx.register_custom_op_symbolic("aten::upsample_nearest2d", nearest_neighbours, OPSET)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of branches that depend on shapes, all of which `check` covers
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            exported,
            example_inputs(2, 64, 96)[: len(exported.inputs)],
            str(path),
            input_names=exported.inputs,
            output_names=exported.outputs,
            dynamic_axes={name: free.get(name, {0: "batch"}) for name in names},
            opset_version=OPSET,
            dynamo=False,
        )
        return path.read_bytes()


@torch.no_grad()
def describe(model: Any, exported: ExportedModel, detector: Detector) -> None:
    """Add shapes, documentation and metadata to `model`, an `onnx.ModelProto`."""
    outputs = exported(*example_inputs(1, 64, 96)[: len(exported.inputs)])
    for value, tensor in zip(model.graph.output, outputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim[1:], tensor.shape[1:], strict=True):
            if not dim.dim_param.startswith("mask_"):
                dim.dim_value = size  # tracing leaves names instead
    model.producer_name = "Conditional DETR"
    model.graph.doc_string = PAPERS[detector.args.model]
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = DOCUMENTATION[value.name]
    facts = {
        "class_names": detector.classes.names,
        "class_ids": detector.classes.ids,
        "min_size": detector.args.min_size,
        "max_size": detector.args.max_size,
        "model": detector.args.model,
    }
    for key, fact in facts.items():
        model.metadata_props.add(key=key, value=json.dumps(fact, ensure_ascii=False))


def check(compute: Compute, title: str, exported: ExportedModel) -> None:
    """Compare a runtime's outputs with PyTorch's; print a line for each batch size and image size.

    Args:
        compute: runs the file in the runtime.
        title: the runtime's name.
        exported: the model in PyTorch.

    Raises:
        InputError: if outputs differ by more than `TOLERANCE`.
    """
    print(f"largest differences between {title} and PyTorch (tolerance: {TOLERANCE:g})")
    for batch_size in BATCH_SIZES:
        for height, width in SIZES:
            inputs = example_inputs(batch_size, height, width, seed=height)[: len(exported.inputs)]
            feed = {name: tensor.numpy() for name, tensor in zip(exported.inputs, inputs, strict=True)}
            found = {name: torch.from_numpy(array) for name, array in compute(feed).items()}
            differences = dict(compare(exported, found, inputs))
            texts = [f"{name} {difference:.1e}" for name, difference in differences.items()]
            print(f"  {batch_size} × {height}×{width}: {', '.join(texts)}")
            if not all(difference <= TOLERANCE for difference in differences.values()):
                raise InputError(f"the outputs of {title} and PyTorch differ too much; no file was written")


@torch.no_grad()
def compare(exported: ExportedModel, found: dict[str, Tensor], inputs: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Yield each output's name, and the largest difference between the runtime's values (`found`) and PyTorch's.

    Detections with nearly equal scores may swap places: each is compared with the nearest detection of its label.
    """
    images, padding, *_ = inputs
    expected = exported.model(NestedTensor(images, padding))
    for name in exported.predictions:
        yield name, (found[name] - expected[name]).abs().max().item()
    if not exported.postprocess:
        return
    scores = exported.postprocess.batched(expected, inputs[2])[0]
    yield "scores", (found["scores"] - scores).abs().max().item()
    # All detections, not only the highest: the last ones that are kept may differ.
    everything = PostProcess(expected["pred_logits"][0].numel(), exported.postprocess.classification)
    scores, labels, boxes, _ = everything.batched(expected, inputs[2])
    distance = (found["boxes"][:, :, None] - boxes[:, None]).abs().amax(-1) / inputs[2].max()  # [B, N, Q·K]
    distance = distance.maximum((found["scores"][:, :, None] - scores[:, None]).abs())
    distance[found["labels"][:, :, None] != labels[:, None]] = torch.inf
    yield "detections", distance.amin(-1).max().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    flags = parse_flags("export_onnx", argv)
    packages = "onnx", *flags.check_with
    onnx, *_ = (need(name, " ".join(packages), "export to ONNX") for name in packages)
    detector = load_detector(flags.checkpoint)
    detector.postprocess.num_detections = flags.max_detections or detector.postprocess.num_detections
    exported = ExportedModel(detector.model, detector.postprocess if flags.postprocess else None).eval()
    model = onnx.load_from_string(export(exported))
    describe(model, exported, detector)
    contents = model.SerializeToString()
    for runtime in flags.check_with:
        check(LOADERS[runtime](contents), TITLES[runtime], exported)
    with replacing(flags.output) as file:
        file.write(contents)
    print(f"wrote {flags.output} ({len(contents) / 1e6:.0f} MB)")


if __name__ == "__main__":
    run_command(main)
