"""The mask head equals that of the published code: see tests/data/README.md."""

import json
import zlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from main import get_args_parser
from models import build_model
from models.classification import SoftmaxWithNoObject
from models.detector import Embeddings
from models.mask_loss import pair_losses
from models.postprocess_masks import PostProcessPanoptic
from models.segmentation import AttentionMaps, MaskHead, QueryMasks
from run.step import logged_losses
from tests.reference import DATA, load_figures, reference_images, reference_targets, reference_weights, sharpened
from util.nested_tensor import NestedTensor

PANOPTIC = {
    "detr_resnet50_panoptic": ("--model", "detr"),
    "conditional_detr_resnet50_panoptic": (),
}


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Head(torch.nn.Module):
    """The mask head without a detector, with reference weights."""

    def __init__(self):
        super().__init__()
        self.bbox_attention = AttentionMaps(256, 8)
        self.mask_head = MaskHead(256, 8, [1024, 512, 256])
        self.load_state_dict(reference_weights(self.state_dict()))


def random_tensor(name, *shape, scale=1.0):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=torch.float32)


@pytest.fixture
def head_and_figures():
    _, arrays = load_figures("segmentation_head")
    features = random_tensor("proj", 2, 256, 5, 7)
    stages = [
        random_tensor("layer1", 2, 256, 38, 51, scale=0.05),
        random_tensor("layer2", 2, 512, 19, 26, scale=0.05),
        random_tensor("layer3", 2, 1024, 10, 13, scale=0.05),
        features,
    ]
    embeddings = Embeddings(
        stages=[NestedTensor(stage, arrays["padding"]) for stage in stages],
        features=features,
        memory=random_tensor("memory", 2, 256, 5, 7, scale=3).flatten(2).transpose(1, 2),
        hs=random_tensor("hs", 2, 12, 256, scale=3)[None],
        reference=None,
    )
    return QueryMasks(Head(), embeddings), arrays


@torch.no_grad()
def test_attention_and_masks_of_the_head_equal_the_published_ones(head_and_figures):
    masks, arrays = head_and_figures
    assert sum(p.numel() for p in masks.model.parameters()) == 1_333_657
    keys, padding = masks.shared[0], arrays["padding"].flatten(1)
    for image, queries in enumerate(masks.embeddings.hs[-1]):
        maps = masks.model.bbox_attention(queries, keys[image], padding[image])
        assert_close(maps, arrays["attention"][image].flatten(2), atol=1e-5, rtol=0)
    assert_close(masks.all(), arrays["pred_masks"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_chosen_queries_have_the_same_masks_as_among_all_queries(head_and_figures):
    masks, arrays = head_and_figures
    chosen = [torch.tensor([7, 0, 7]), torch.tensor([3])]
    expected = torch.cat([of_image[index] for of_image, index in zip(arrays["pred_masks"], chosen, strict=True)])
    assert_close(masks.of(chosen), expected, atol=1e-4, rtol=0)
    assert_close(masks.of_image(1, chosen[1]), expected[3:], atol=1e-4, rtol=0)


def test_without_queries_there_are_no_masks_and_gradients_are_zero(head_and_figures):
    masks, _ = head_and_figures
    none = torch.zeros(0, dtype=torch.int64)
    nothing = masks.of([none, none])
    assert nothing.shape == (0, 38, 51)
    nothing.sum().backward()
    assert all(not p.grad.any() for p in masks.model.parameters())  # if they were None, other processes would wait


def test_losses_of_masks_equal_the_published_ones():
    figures, _ = load_figures("segmentation_head")
    expected = figures["mask_losses"]
    logits, target = random_tensor("x", 5, 1938) * 2, (random_tensor("target", 5, 1938) > 0).float()
    for name, losses in pair_losses(logits, target).items():
        assert losses.sum().item() / expected["num_boxes"] == pytest.approx(expected[name], abs=1e-6)


def test_panoptic_segmentations_equal_the_published_ones():
    """They have merged stuff, a small segment, a mask that is hidden by others, and an image without segments."""
    figures, arrays = load_figures("segmentation_head")
    expected = figures["panoptic"]
    outputs = {
        key: arrays[f"panoptic_{key.removeprefix('pred_')}"] for key in ("pred_logits", "pred_masks", "pred_boxes")
    }
    postprocess = PostProcessPanoptic(threshold=expected["threshold"], classification=SoftmaxWithNoObject())
    results = postprocess(outputs, expected["processed_sizes"], expected["target_sizes"])
    for image, result in enumerate(results):
        assert result["segments_info"] == expected["segments_info"][image]
        assert result["ids"].tolist() == arrays[f"panoptic{image}_ids"].tolist()


def inscribed_ellipses(boxes, height, width):
    """Return masks [N, H, W] of the ellipses inscribed in N relative boxes (cx, cy, w, h)."""
    y = (torch.arange(height) + 0.5)[:, None]
    x = (torch.arange(width) + 0.5)[None]
    cx, cy, w, h = (boxes * torch.tensor([width, height, width, height])).T[..., None, None]
    return ((((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2) <= 1).to(torch.uint8)


@pytest.mark.parametrize("name", PANOPTIC)
def test_models_with_masks_equal_the_published_ones(name, _float64):
    figures, arrays = load_figures(name)
    arrays = {key: value.double() if value.is_floating_point() else value for key, value in arrays.items()}
    flags = [*PANOPTIC[name], "--masks", "--dropout", "0", "--device", "cpu"]
    args = get_args_parser().parse_args(flags)
    model, criterion, postprocessors = build_model(args, figures["num_classes"])
    keys = [f"{key} {'x'.join(map(str, value.shape)) or 'scalar'}" for key, value in model.state_dict().items()]
    assert sorted(keys) == sorted((DATA / f"state_dict_keys_{name}.txt").read_text().splitlines())
    model.load_state_dict(sharpened(reference_weights(model.state_dict())))
    sizes = figures["sizes"]
    images = [image.double() for image in reference_images(sizes, figures["seed"])]
    targets = reference_targets(figures["num_boxes"], figures["seed"], figures["num_classes"])
    for target, size, original in zip(targets, sizes, figures["orig_sizes"], strict=True):
        target["boxes"] = target["boxes"].double()
        target["masks"] = inscribed_ellipses(target["boxes"], *size)
        target |= {"size": torch.tensor(size), "orig_size": torch.tensor(original)}

    chosen = figures["mask_queries"]
    if name.startswith("detr"):  # the masks of all queries, as hub models return them
        chosen = list(range(100))
        model.all_masks = True
    with torch.no_grad():
        outputs = model.eval()(images)
        masks = outputs["pred_masks"] if model.all_masks else outputs["masks"].of([torch.tensor(chosen)] * len(images))
    for key in ("pred_logits", "pred_boxes"):
        assert_close(outputs[key], arrays[key], atol=1e-5, rtol=0)
    masks = masks.view(len(images), len(chosen), *masks.shape[-2:])
    recorded = masks[:, [chosen.index(query) for query in figures["mask_queries"]]]
    assert_close(recorded, arrays["pred_masks"], atol=1e-5, rtol=1e-6)
    assert_close(masks.mean((2, 3)), arrays["pred_masks_mean"][:, chosen], atol=1e-5, rtol=1e-6)
    assert_close(masks.std((2, 3)), arrays["pred_masks_std"][:, chosen], atol=1e-5, rtol=1e-6)

    model.all_masks = False
    outputs = model.train()(images)
    losses = criterion.train()(outputs, targets)
    expected = figures["losses"]
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=0, abs=1e-9)
    loss = logged_losses(losses, criterion.weight_dict)["loss"]
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-9)
    loss.backward()
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None}
    found = {key: norms[key] for key in figures["grad_norms"]}
    assert found == pytest.approx(figures["grad_norms"], rel=1e-6, abs=1e-9)
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]

    if "segm0_area" not in arrays:
        return
    with torch.no_grad():
        outputs = model.eval()(images)
    results = postprocessors["bbox"].extend([{}, {}], outputs, targets)
    results = postprocessors["segm"].extend(results, outputs, targets)
    for image, (result, size) in enumerate(zip(results, figures["orig_sizes"], strict=True)):
        assert result["masks"].shape == (100, 1, *size)
        areas = result["masks"].sum((1, 2, 3), dtype=torch.int64)
        assert areas.tolist() == arrays[f"segm{image}_area"].tolist()
        bits = np.packbits(result["masks"][figures["mask_queries"]].numpy())
        assert bits.tolist() == arrays[f"segm{image}_masks"].tolist()
        assert torch.equal(result["labels"], arrays[f"segm{image}_labels"])
    panoptic = PostProcessPanoptic(threshold=figures["panoptic_threshold"])(outputs, sizes, figures["orig_sizes"])
    for image, result in enumerate(panoptic):
        assert result["segments_info"] == figures["panoptic_segments"][str(image)]
        assert result["ids"].tolist() == arrays[f"panoptic{image}_ids"].tolist()


def test_figures_are_recorded_in_float64():
    for name in PANOPTIC:
        assert json.loads((DATA / f"{name}.json").read_text())["precision"].startswith("float64")
