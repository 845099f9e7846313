"""Models that are exported to ONNX: they compute the same outputs, and find the same objects without PyTorch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.images import read_image
from main import get_args_parser
from models import build_model
from models.postprocess import PostProcess
from scripts import export_onnx
from scripts.detector import load_detector
from scripts.onnx_runtimes import load_onnxruntime
from tests.conftest import ROOT
from tests.reference import reference_weights
from tests.small import FLAGS
from util.errors import InputError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

CLASSES = {"class_ids": {0: 17, 1: "kühl"}, "class_names": {0: "cat", 1: "fridge"}}
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], None, '__main__')"
)


def write_checkpoint(path: Path, *flags: object) -> Path:
    args = get_args_parser().parse_args([str(flag) for flag in (*FLAGS, "--num_classes", 2, *flags)])
    weights = reference_weights(build_model(args)[0].state_dict())
    weights["detr." * args.masks + "class_embed.bias"] += 4  # scores around a half
    torch.save({"model": weights, "args": vars(args), **CLASSES}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_checkpoint(folder / "checkpoint.pth", "--backbone_norm", "batch", "--min_size", 64, "--max_size", 100)


@pytest.fixture(scope="module", params=["plain", "postprocess"])
def exported(request, checkpoint) -> Path:
    path = checkpoint.with_name(f"{request.param}.onnx")
    flags = ["--postprocess"] if request.param == "postprocess" else []
    export_onnx.main(["--checkpoint", str(checkpoint), "--output", str(path), *flags])
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Write images of different shapes, as PNG, so that the detector and the example read the same pixels."""
    rng = np.random.default_rng(0)
    paths = [tmp_path_factory.mktemp("photos") / name for name in ("wide.png", "high.png")]
    for path, (height, width) in zip(paths, ((64, 90), (82, 64)), strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


def run(model: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {key: value.numpy() for key, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def test_the_file_describes_its_inputs_outputs_and_classes(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version >= 17
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["images"] == ["batch", 3, "height", "width"]
    assert shapes["padding_mask"] == ["batch", "height", "width"]
    expected = {"images", "padding_mask", "pred_logits", "pred_boxes"}
    if exported.stem == "postprocess":
        expected |= {"target_sizes", "scores", "labels", "boxes"}
    assert shapes.keys() == expected
    assert shapes["pred_logits"] == ["batch", 7, 2]
    assert shapes["pred_boxes"] == ["batch", 7, 4]
    if exported.stem == "postprocess":
        assert shapes["target_sizes"] == ["batch", 2]
        assert shapes["scores"] == shapes["labels"] == ["batch", 14]
        assert shapes["boxes"] == ["batch", 14, 4]
    assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["class_names"] == {"0": "cat", "1": "fridge"}
    assert facts["class_ids"] == {"0": 17, "1": "kühl"}
    assert (facts["min_size"], facts["max_size"]) == (64, 100)


def test_outputs_equal_those_of_the_model(exported, checkpoint):
    detector = load_detector(str(checkpoint))
    images, padding, sizes = export_onnx.example_inputs(3, 71, 190, seed=3)
    inputs = {"images": images, "padding_mask": padding}
    with_sizes = exported.stem == "postprocess"
    found = run(exported, inputs | ({"target_sizes": sizes} if with_sizes else {}))
    with torch.no_grad():
        pieces = [
            image[:, : (~mask[:, 0]).sum(), : (~mask[0]).sum()] for image, mask in zip(images, padding, strict=True)
        ]
        expected = detector.model(pieces)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=0)
    if with_sizes:
        for i, image in enumerate(PostProcess()(found, sizes)):
            for name in ("scores", "labels", "boxes"):
                value = image[name]
                torch.testing.assert_close(found[name][i], value)


def test_max_detections_limits_the_detections(checkpoint, tmp_path):
    command = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.onnx"), "--max_detections"]
    export_onnx.main([*command, "3", "--postprocess"])
    outputs = onnx.load(tmp_path / "model.onnx").graph.output
    assert {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in outputs} == {
        **{"pred_logits": 7, "pred_boxes": 7},
        **{"scores": 3, "labels": 3, "boxes": 3},
    }
    with pytest.raises(InputError, match="--max_detections: only --postprocess writes detections"):
        export_onnx.main([*command, "3"])
    with pytest.raises(InputError, match="--max_detections 0: must be at least 1"):
        export_onnx.main([*command, "0", "--postprocess"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_padding_mask_is_resized_as_in_pytorch(tmp_path):
    class Shrink(torch.nn.Module):
        def forward(self, mask, features):
            return F.interpolate(mask, size=features.shape[-2:], mode="nearest")

    torch.onnx.register_custom_op_symbolic("aten::upsample_nearest2d", export_onnx.nearest_neighbours, 17)
    torch.onnx.export(
        Shrink(),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 2, 2)),
        str(tmp_path / "shrink.onnx"),
        input_names=["mask", "features"],
        dynamic_axes={name: {2: "height", 3: "width"} for name in ("mask", "features")},
        opset_version=17,
        dynamo=False,
    )
    session = ort.InferenceSession(tmp_path / "shrink.onnx", providers=["CPUExecutionProvider"])
    for size in range(33, 300):
        small = -(-size // 32)
        mask = torch.arange(2.0 * size).view(1, 1, 2, size)
        (found,) = session.run(None, {"mask": mask.numpy(), "features": np.zeros((1, 1, 1, small), np.float32)})
        assert found[0, 0, 0].tolist() == F.interpolate(mask, size=(1, small), mode="nearest")[0, 0, 0].tolist(), size


def test_another_variant_is_exported_and_compared(tmp_path, capsys):
    flags = ("--backbone", "resnet50", "--dilation", "--position_embedding", "learned")
    source = write_checkpoint(tmp_path / "checkpoint.pth", "--enc_layers", 1, "--dec_layers", 1, *flags)
    output = tmp_path / "new" / "model.onnx"
    export_onnx.main(["--checkpoint", str(source), "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert "0.001" in lines[0]
    cases = [re.match(r"  (\d) × (\S+): pred_logits \S+e-\d+, pred_boxes \S+e-\d+$", line) for line in lines]
    assert [case.groups() for case in cases if case] == [
        (batch, size) for batch in "12" for size in ("96×128", "104×112", "165×131")
    ]
    assert re.match(rf"wrote {output} \(\d+ MB\)", lines[-1])
    graph = onnx.load(output).graph
    stored = {tensor.name for tensor in graph.initializer}
    weights = [name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]]
    assert len(weights) == 2 * 54
    assert stored.issuperset(weights)


def test_masks_are_exported_and_compared(tmp_path, capsys):
    source, output = write_checkpoint(tmp_path / "checkpoint.pth", "--masks"), tmp_path / "model.onnx"
    export_onnx.main(["--checkpoint", str(source), "--output", str(output), "--postprocess"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("pred_masks" in line for line in lines) == 6
    inputs = {"images": torch.zeros(1, 3, 70, 90, dtype=torch.uint8), "target_sizes": torch.tensor([[70, 90]])}
    found = run(output, inputs | {"padding_mask": torch.zeros(1, 70, 90, dtype=torch.bool)})
    assert found["pred_masks"].shape == (1, 7, 18, 23)


def test_differences_leave_no_file(checkpoint, tmp_path, monkeypatch):
    """ONNX's own Resize makes the outputs differ: for some sizes, it takes other pixels of the mask."""
    torch.onnx.unregister_custom_op_symbolic("aten::upsample_nearest2d", export_onnx.OPSET)
    monkeypatch.setattr(torch.onnx, "register_custom_op_symbolic", lambda *_: None)
    with pytest.raises(InputError, match="differ too much; no file"):
        export_onnx.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("library", "flags", "packages"),
    [
        ("onnx", (), "onnx onnxruntime"),
        ("onnxruntime", (), "onnx onnxruntime"),
        ("openvino", ("--check_with", "openvino"), "onnx openvino"),
    ],
)
def test_a_missing_library_is_named(library, flags, packages, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"pip install {packages} "):
        export_onnx.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.onnx"), *flags])


def test_every_chosen_runtime_checks_the_file(checkpoint, tmp_path, monkeypatch, capsys):
    def load_wrong(contents):
        compute = load_onnxruntime(contents)
        return lambda inputs: {name: array + 0.01 for name, array in compute(inputs).items()}

    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    monkeypatch.setitem(export_onnx.LOADERS, "openvino", load_wrong)
    command = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.onnx"), "--check_with"]
    with pytest.raises(InputError, match="the outputs of OpenVINO and PyTorch differ too much; no file was written"):
        export_onnx.main([*command, "onnxruntime", "openvino"])
    assert re.findall("between (.*) and", capsys.readouterr().out) == ["ONNX Runtime", "OpenVINO"]
    assert not list(tmp_path.iterdir())


def test_unusable_checkpoints_and_outputs_are_named(checkpoint, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pth: not a checkpoint"):
        export_onnx.main(["--checkpoint", str(tmp_path / "text.pth"), "--output", str(tmp_path / "model.onnx")])
    with pytest.raises(InputError, match="cannot be written"):
        export_onnx.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "text.pth" / "model.onnx")])


def run_example(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, ROOT / "scripts" / "onnx_example.py", *flags]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)


def test_the_example_finds_the_same_objects_without_torch(exported, checkpoint, photos):
    process = run_example(exported, *photos, "--threshold", 0.4)
    assert process.returncode == 0, process.stderr
    lines, detector = [], load_detector(str(checkpoint))
    for path, found in zip(photos, detector([read_image(path).pixels for path in photos]), strict=True):
        lines += [[str(path)]]
        for score, label, box in zip(*(found[name].tolist() for name in ("scores", "labels", "boxes")), strict=True):
            if score >= 0.4:
                lines += [[score, f"{detector.classes.name_of(label)} (id {detector.classes.id_of(label)})", *box]]
    assert len(lines) > 4
    printed = process.stdout.splitlines()
    assert len(printed) == len(lines)
    for line, expected in zip(printed, lines, strict=True):
        if len(expected) == 1:
            assert line == expected[0]
            continue
        score, name, *box = re.match(r"  (\S+) (.*) at (\S+) (\S+) (\S+) (\S+)", line).groups()
        assert name == expected[1]
        assert [float(score), *map(float, box)] == pytest.approx([expected[0], *expected[2:]], abs=0.06)


def test_the_example_reports_mistakes_in_one_line(exported, photos, checkpoint):
    for flags, said in [((checkpoint, *photos), "error: "), ((exported, checkpoint), "cannot identify image file")]:
        process = run_example(*flags)
        assert process.returncode == 1
        assert said in process.stderr
        assert len(process.stderr.strip().splitlines()) == 1
