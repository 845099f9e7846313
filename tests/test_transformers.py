"""The implementation in Hugging Face transformers gives the same outputs with the same weights."""

import pytest
import torch
from torch.testing import assert_close

from checkpoints.huggingface_names import name_in_files, their_modules, to_ours, to_theirs
from models import build_model
from tests.reference import reference_images, reference_weights, sharpened
from util.nested_tensor import nested_tensor_from_tensor_list

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("model", ["conditional_detr", "detr"])
def test_outputs_for_a_padded_batch_are_the_same(model, parse):
    name = {"conditional_detr": "ConditionalDetr", "detr": "Detr"}[model]
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
        num_labels=91,
    )
    theirs = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    ours, _, _ = build_model(parse("--model", model))
    weights = reference_weights(ours.state_dict())
    weights = sharpened(weights) if model == "detr" else weights  # so that queries differ
    ours.load_state_dict(weights)
    ours.eval()
    modules = their_modules(config.encoder_layers, config.decoder_layers, config.backbone_config.depths, model)
    in_files = to_theirs(weights, modules)
    theirs.load_state_dict({key: in_files[name_in_files(key, model)] for key in theirs.state_dict()})
    assert_close(to_ours(theirs.state_dict(), modules, model), weights, atol=0, rtol=0)

    samples = nested_tensor_from_tensor_list(reference_images([(128, 160), (96, 192), (160, 64)], seed=3))
    samples.tensors = samples.tensors.double()
    with torch.no_grad():
        expected = theirs.double()(pixel_values=samples.tensors, pixel_mask=(~samples.mask).long())
        outputs = ours.double()(samples)
    assert_close(outputs["pred_logits"], expected.logits, atol=1e-5, rtol=0)
    assert_close(outputs["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=0)


def test_masks_for_a_padded_batch_are_the_same(parse):
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
        num_labels=250,
    )
    theirs = transformers.DetrForSegmentation(config).eval()
    ours, _, _ = build_model(parse("--model", "detr", "--masks", "--num_classes", 250))
    weights = sharpened(reference_weights(ours.state_dict()))
    ours.load_state_dict(weights)
    ours.all_masks = True
    layers = config.encoder_layers, config.decoder_layers
    modules = their_modules(*layers, config.backbone_config.depths, "detr", masks=True)
    in_files = to_theirs(weights, modules)
    theirs.load_state_dict({key: in_files[name_in_files(key, "detr")] for key in theirs.state_dict()})

    samples = nested_tensor_from_tensor_list(reference_images([(64, 96), (96, 70)], seed=3))
    samples.tensors = samples.tensors.double()
    with torch.no_grad():
        expected = theirs.double()(pixel_values=samples.tensors, pixel_mask=(~samples.mask).long())
        outputs = ours.double().eval()(samples)
    assert_close(outputs["pred_logits"], expected.logits, atol=1e-4, rtol=0)
    assert_close(outputs["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=0)
    assert_close(outputs["pred_masks"], expected.pred_masks, atol=1e-3, rtol=0)  # weights are up to 100 times as large
