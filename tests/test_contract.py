"""Names, keys, flags and numbers that notebooks, forks and checkpoints rely on."""

import importlib
import inspect

import pytest
import torch

import datasets
import engine
import hubconf
import main
import training
from datasets.coco_eval import CocoEvaluator
from models import build_model
from models.criterion import SetCriterion
from models.postprocess import PostProcess
from tests.reference import DATA
from util.misc import NestedTensor, nested_tensor_from_tensor_list

PUBLISHED_FLAGS = {
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "batch_size": 2,
    "weight_decay": 1e-4,
    "epochs": 50,
    "lr_drop": 40,
    "clip_max_norm": 0.1,
    "frozen_weights": None,
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 2048,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "num_queries": 300,
    "pre_norm": False,
    "masks": False,
    "aux_loss": True,
    "set_cost_class": 2,
    "set_cost_bbox": 5,
    "set_cost_giou": 2,
    "mask_loss_coef": 1,
    "dice_loss_coef": 1,
    "cls_loss_coef": 2,
    "bbox_loss_coef": 5,
    "giou_loss_coef": 2,
    "focal_alpha": 0.25,
    "dataset_file": "coco",
    "coco_path": None,
    "coco_panoptic_path": None,
    "remove_difficult": False,
    "output_dir": "",
    "seed": 42,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "num_workers": 2,
    "world_size": 1,
    "dist_url": "env://",
}


def test_flags():
    args = main.get_args_parser().parse_args([])
    assert {flag: getattr(args, flag) for flag in PUBLISHED_FLAGS} == PUBLISHED_FLAGS
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert main.get_args_parser().parse_args(["--no_aux_loss"]).aux_loss is False
    assert main.get_args_parser().parse_args(["--local-rank=1"]).local_rank == 1


@pytest.mark.parametrize(
    ("backbone", "parameters", "trained"),
    [("resnet50", 43_418_401, 43_196_001), ("resnet101", 62_358_305, 62_135_905)],
)
def test_state_dict(backbone, parameters, trained, parse):
    model, _, _ = build_model(parse("--backbone", backbone))
    lines = (DATA / f"state_dict_keys_{backbone}.txt").read_text().splitlines()
    assert [f"{key} {'x'.join(map(str, value.shape))}" for key, value in model.state_dict().items()] == lines
    assert main.count_parameters(model) == (parameters, trained)
    dilated, _, _ = build_model(parse("--backbone", backbone, "--dilation"))
    assert dilated.state_dict().keys() == model.state_dict().keys()


def test_optimizer_groups_are_in_state_dict_order(parse):
    model, _, _ = build_model(parse("--backbone", "resnet18"))
    optimizer = training.build_optimizer(model, 1e-4, 1e-5, 1e-4)
    names = [key for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad]
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    for group, is_backbone in zip(shapes, (False, True), strict=True):
        assert group == [list(model.state_dict()[n].shape) for n in names if ("backbone" in n) == is_backbone]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


def test_names_of_util_misc():
    misc = importlib.import_module("util.misc")
    for name in misc.__all__:
        assert getattr(misc, name) is not None
    assert {"get_rank", "get_world_size", "is_main_process", "is_dist_avail_and_initialized", "reduce_dict"} < set(
        misc.__all__
    )
    assert importlib.import_module("util.box_ops").box_cxcywh_to_xyxy


def test_signatures():
    def names(function):
        return list(inspect.signature(function).parameters)

    trained = ["model", "criterion", "data_loader", "optimizer", "device", "epoch", "max_norm"]
    evaluated = ["model", "criterion", "postprocessors", "data_loader", "base_ds", "device", "output_dir"]
    assert names(engine.train_one_epoch)[:7] == trained
    assert names(engine.evaluate)[:7] == evaluated
    assert names(datasets.build_dataset)[:2] == ["image_set", "args"]
    assert names(datasets.get_coco_api_from_dataset) == ["dataset"]
    assert names(CocoEvaluator)[:2] == ["coco_gt", "iou_types"]
    for entry in ("resnet50", "resnet50_dc5", "resnet101", "resnet101_dc5"):
        signature = inspect.signature(getattr(hubconf, f"conditional_detr_{entry}"))
        assert [(p.name, p.default) for p in signature.parameters.values()] == [
            ("pretrained", False),
            ("num_classes", 91),
            ("return_postprocessor", False),
        ]


def test_the_three_kinds_of_samples_agree(parse):
    """They are a NestedTensor, a list of images, and one tensor; pixels are uint8 or normalised floats."""
    model, criterion, postprocessors = build_model(
        parse("--backbone", "resnet18", "--enc_layers", 1, "--dec_layers", 2)
    )
    assert isinstance(criterion, SetCriterion)
    assert isinstance(postprocessors["bbox"], PostProcess)
    model.eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    floats = (images / 255 - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        expected = model(floats)
        assert set(expected) == {"pred_logits", "pred_boxes", "aux_outputs"}
        assert expected["pred_logits"].shape == (2, 300, 91)
        assert expected["pred_boxes"].shape == (2, 300, 4)
        for samples in (images, list(images), list(floats), nested_tensor_from_tensor_list(list(images))):
            outputs = model(samples)
            torch.testing.assert_close(outputs["pred_logits"], expected["pred_logits"])
            torch.testing.assert_close(outputs["pred_boxes"], expected["pred_boxes"])


def test_padding_of_uint8_images_is_zero_after_normalisation(parse):
    model, _, _ = build_model(parse("--backbone", "resnet18", "--dec_layers", 2))
    model.eval()
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 64, 96), (3, 80, 40))]
    floats = [(image / 255 - model.pixel_mean) / model.pixel_std for image in images]
    with torch.no_grad():
        torch.testing.assert_close(model(images)["pred_logits"], model(floats)["pred_logits"])


def test_nested_tensor():
    nested = nested_tensor_from_tensor_list([torch.ones(3, 4, 6), torch.ones(3, 5, 2)])
    tensors, mask = nested.decompose()
    assert isinstance(nested, NestedTensor)
    assert tensors.shape == (2, 3, 5, 6)
    assert mask.shape == (2, 5, 6)
    assert (tensors[:, 0].bool() == ~mask).all()
    assert (~mask).sum((1, 2)).tolist() == [24, 10]


def test_build_model_takes_the_namespace_of_a_published_checkpoint(parse):
    args = parse("--backbone", "resnet18")
    for flag in ("num_classes", "backbone_weights", "backbone_norm", "min_size", "max_size"):
        delattr(args, flag)
    assert build_model(args)[0].class_embed.out_features == 91
