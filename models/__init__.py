"""The models by name, and the construction of a model from flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from flags.limits import check_model, check_numbers
from flags.resolve import MODEL_FLAGS, NUM_CLASSES, resolve
from models.backbone import Backbone, Joiner
from models.classification import FocalSigmoid, SoftmaxWithNoObject
from models.conditional_detr import build_conditional_detr
from models.criterion import BoxLoss, CardinalityError, ClassError, ClassLoss, SetCriterion, Term
from models.detector import Detector
from models.detr import build_detr
from models.mask_loss import MaskLoss
from models.matcher import HungarianMatcher
from models.position_encoding import build_position_encoding
from models.postprocess import PostProcess
from models.postprocess_masks import PostProcessPanoptic, PostProcessSegm
from models.segmentation import DETRsegm

MODELS: dict[str, Callable[..., Detector]] = {"conditional_detr": build_conditional_detr, "detr": build_detr}
PANOPTIC_THRESHOLDS = {"conditional_detr": 0.3, "detr": 0.85}  # DETR's is the published one, the other was measured
MODEL_NAMES = {"conditional_detr": "Conditional DETR", "detr": "DETR"}  # as in papers


def build_model(
    args: argparse.Namespace, num_classes: int | None = None, isthing: Mapping[int, bool] | None = None
) -> tuple[Detector | DETRsegm, SetCriterion, dict[str, Any]]:
    """Return the randomly initialised model, its criterion and its postprocessors, from the flags of `main.py`.

    Nothing is read or downloaded: the caller loads pretrained weights. Namespaces of the published code work too;
    missing flags take their defaults.

    Args:
        args: the flags.
        num_classes: the number of classes that the model distinguishes; by default `--num_classes`, else COCO's 91, or
            250 for panoptic data.
        isthing: for panoptic data, True for labels of things, False for labels of stuff; by default, labels up to 90
            are things.

    Raises:
        InputError: if a flag is not supported or contradicts another.
    """
    flags = resolve(args)
    check_numbers(flags, flags=MODEL_FLAGS)
    check_model(flags)
    backbone = Backbone(
        flags.backbone,
        train_backbone=flags.lr_backbone > 0,
        dilation=flags.dilation,
        return_interm_layers=flags.masks,
        norm=flags.backbone_norm,
        train_stem=flags.backbone_weights == "none",
    )
    detector = MODELS[flags.model](
        Joiner(backbone, build_position_encoding(flags)),
        num_classes=num_classes or flags.num_classes or NUM_CLASSES.get(flags.dataset_file, NUM_CLASSES["coco"]),
        num_queries=flags.num_queries,
        dim=flags.hidden_dim,
        num_heads=flags.nheads,
        enc_layers=flags.enc_layers,
        dec_layers=flags.dec_layers,
        dim_feedforward=flags.dim_feedforward,
        dropout=flags.dropout,
        aux_loss=flags.aux_loss,
        checkpoint_activations=flags.checkpoint_activations,
        **({"num_groups": flags.group_detr} if flags.group_detr > 1 else {}),
    )
    classification = SoftmaxWithNoObject(flags.eos_coef) if flags.model == "detr" else FocalSigmoid(flags.focal_alpha)
    matcher = HungarianMatcher(flags.set_cost_class, flags.set_cost_bbox, flags.set_cost_giou, classification)
    terms: list[Term] = [
        ClassLoss(classification, flags.cls_loss_coef),
        BoxLoss(flags.bbox_loss_coef, flags.giou_loss_coef),
        CardinalityError(),
        ClassError(),
    ]
    postprocessors: dict[str, Any] = {"bbox": PostProcess(flags.max_detections, classification)}
    model: Detector | DETRsegm = detector
    if flags.masks:
        model = DETRsegm(detector, flags.nheads, freeze_detr=flags.frozen_weights is not None)
        terms.append(MaskLoss(flags.mask_loss_coef, flags.dice_loss_coef))
        postprocessors["segm"] = PostProcessSegm()
        if flags.dataset_file == "coco_panoptic":
            threshold = PANOPTIC_THRESHOLDS[flags.model]
            postprocessors["panoptic"] = PostProcessPanoptic(isthing, threshold, classification)
    criterion = SetCriterion(
        matcher, terms, num_layers=flags.dec_layers if flags.aux_loss else 1, num_groups=flags.group_detr
    )
    return model, criterion, postprocessors
