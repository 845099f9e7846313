"""Outputs, matching, losses, gradients and training steps of Conditional DETR equal the published ones."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

from main import get_args_parser
from models import build_model
from run.optim import build_optimizer
from run.step import logged_losses
from tests.reference import load_figures, reference_images, reference_targets, reference_weights

VARIANTS = ("conditional_detr_resnet50", "conditional_detr_resnet50_dc5")


@cache
def reference_run(name: str):
    figures, arrays = load_figures(name)
    args = get_args_parser().parse_args(["--dropout", "0", *figures["args"]])
    model, criterion, postprocessors = build_model(args)
    model.load_state_dict(reference_weights(model.state_dict()))
    images = reference_images(figures["sizes"], figures["seed"])
    targets = reference_targets(figures["num_boxes"], figures["seed"])
    with torch.no_grad():
        outputs = model.eval()(images)
    return figures, arrays, args, model, criterion, postprocessors, images, targets, outputs


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_equal_the_published_ones(name):
    _, arrays, *_, outputs = reference_run(name)
    for key in ("pred_logits", "pred_boxes"):
        assert_close(outputs[key], arrays[key], atol=1e-4, rtol=0)
        for layer in (0, 4):
            if f"aux{layer}_{key}" in arrays:
                assert_close(outputs["aux_outputs"][layer][key], arrays[f"aux{layer}_{key}"], atol=1e-4, rtol=0)
    assert len(outputs["aux_outputs"]) == 5


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_equal_the_published_ones(name):
    _, arrays, _, _, criterion, _, _, targets, outputs = reference_run(name)
    layers = [outputs, *outputs["aux_outputs"]]
    matches = [criterion.matcher(layer, targets) for layer in layers]
    recorded = [key for key in arrays if key.startswith("match")]
    assert len(recorded) == 12
    for key in recorded:
        layer, image = (int(number) for number in key.removeprefix("match").split("_"))
        pairs = torch.stack(matches[layer][image])
        assert pairs.tolist() == arrays[key].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_detections_equal_the_published_ones(name):
    _, arrays, *_, postprocessors, _, _, _ = reference_run(name)
    # From the recorded outputs: ours could exchange queries of nearly equal scores.
    recorded = {key: arrays[key] for key in ("pred_logits", "pred_boxes")}
    detections = postprocessors["bbox"](recorded, torch.tensor([[480, 640], [427, 640]]))
    for image, detection in enumerate(detections):
        assert torch.equal(detection["labels"], arrays[f"post{image}_labels"])
        assert_close(detection["scores"], arrays[f"post{image}_scores"], atol=1e-4, rtol=0)
        assert_close(detection["boxes"], arrays[f"post{image}_boxes"], atol=1e-3, rtol=0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", VARIANTS[1:])
def test_training_steps_equal_the_published_ones(name, float64):
    """The steps of the dilated model; tests/test_parity_float64.py tests those of the other one.

    They are computed in float64: in float32, rounding at ReLUs, which depends on the CPU, changes the norm of the
    third gradient by 2 %.
    """
    figures, _, args, model, criterion, _, images, targets, _ = reference_run(name)
    model.double().train()
    images = [image.double() for image in images]
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in targets]
    optimizer = build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    for step, expected in enumerate(figures["trajectory"]):
        losses = criterion(model(images), targets)
        loss = logged_losses(losses, criterion.weight_dict)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert losses.keys() == figures["losses"].keys()
            for key, value in figures["losses"].items():
                assert losses[key].item() == pytest.approx(value, abs=1e-4), key
            norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None}
            assert norms.keys() == figures["grad_norms"].keys()
            for key, value in figures["grad_norms"].items():
                assert norms[key] == pytest.approx(value, rel=1e-2, abs=1e-3), key
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
        optimizer.step()
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
        assert grad_norm.item() == pytest.approx(expected["grad_norm"], rel=5e-3)
    model.float().load_state_dict(reference_weights(model.state_dict()))
