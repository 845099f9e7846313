"""All models equal the published code in float64, where rounding hides no mistake: see tests/data/README.md."""

import pytest
import torch
from torch.testing import assert_close

from main import get_args_parser
from models import build_model
from run.optim import build_optimizer
from run.step import logged_losses
from tests.reference import load_figures, reference_images, reference_targets, reference_weights, sharpened

FIGURES = {
    "sharp_detr_resnet50": ["--model", "detr"],
    "sharp_conditional_detr_resnet50": [],
    "sharp_conditional_detr_resnet50_group3": ["--group_detr", "3", "--num_queries", "100"],
}


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FIGURES)
def test_outputs_losses_gradients_and_steps_equal_the_published_ones(name, _float64):
    figures, arrays = load_figures(name)
    arrays = {key: value.double() if value.is_floating_point() else value for key, value in arrays.items()}
    args = get_args_parser().parse_args([*FIGURES[name], "--dropout", "0", "--device", "cpu"])
    model, criterion, postprocessors = build_model(args)
    model.load_state_dict(sharpened(reference_weights(model.state_dict())))
    images = [image.double() for image in reference_images(figures["sizes"], figures["seed"])]
    targets = reference_targets(figures["num_boxes"], figures["seed"])
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in targets]
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]

    with torch.no_grad():
        outputs = model.eval()(images)
    for key in ("pred_logits", "pred_boxes"):
        assert_close(outputs[key], arrays[key], atol=1e-5, rtol=0)
        for layer in (0, 4):
            assert_close(outputs["aux_outputs"][layer][key][:, ::5], arrays[f"aux{layer}_{key}"], atol=1e-5, rtol=0)
    check_losses(criterion.eval()(outputs, targets), figures["eval_losses"])
    detections = postprocessors["bbox"](outputs, torch.tensor([[480, 640], [427, 640]]))
    for image, found in enumerate(detections):
        assert torch.equal(found["labels"], arrays[f"post{image}_labels"])
        assert_close(found["scores"], arrays[f"post{image}_scores"], atol=1e-5, rtol=0)
        assert_close(found["boxes"], arrays[f"post{image}_boxes"], atol=1e-3, rtol=0)

    optimizer = build_optimizer(model.train(), args.lr, args.lr_backbone, args.weight_decay)
    criterion.train()
    for step, expected in enumerate(figures["trajectory"]):
        outputs = model(images)
        losses = criterion(outputs, targets)
        loss = logged_losses(losses, criterion.weight_dict)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for i, layer in enumerate([outputs, *outputs["aux_outputs"]]):
                for image, pairs in enumerate(criterion.matcher(layer, targets, args.group_detr)):
                    assert torch.stack(pairs).tolist() == arrays[f"match{i}_{image}"].tolist()
            if args.group_detr > 1:
                every_20th = outputs["pred_logits"][:, ::20]
                assert_close(every_20th, arrays["train_pred_logits_every20th_query"], atol=1e-5, rtol=0)
            check_losses(losses, figures["losses"])
            norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None}
            assert norms == pytest.approx(figures["grad_norms"], rel=1e-6, abs=1e-9)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
        optimizer.step()
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
        assert grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-6)


def check_losses(losses, figures):
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(figures, rel=0, abs=1e-9)
