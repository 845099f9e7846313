"""The models and how a namespace of flags becomes one."""

from __future__ import annotations

import argparse

from torch import nn

from flags.limits import COCO_NUM_CLASSES, check_model
from models.backbone import Backbone, BackboneWithPosition
from models.conditional_detr import ConditionalDETR
from models.criterion import SetCriterion
from models.matcher import HungarianMatcher
from models.position_encoding import build_position_embedding
from models.postprocess import PostProcess
from models.transformer import Transformer


def build_model(args: argparse.Namespace) -> tuple[ConditionalDETR, SetCriterion, dict[str, nn.Module]]:
    """The randomly initialised model, its criterion and its postprocessors, from the flags of `main.get_args_parser`.

    Reads and downloads nothing: pretrained weights are loaded by the caller. Namespaces of the published code work too;
    what they lack takes its default (91 classes, frozen norms, no activation checkpointing).

    Raises:
        InputError: for a flag that is not supported or that contradicts another.
    """
    check_model(args)
    backbone = Backbone(
        args.backbone,
        dilation=args.dilation,
        norm=getattr(args, "backbone_norm", "frozen"),
        train=trained_part(args),
    )
    model = ConditionalDETR(
        BackboneWithPosition(backbone, build_position_embedding(args.position_embedding, args.hidden_dim)),
        Transformer(
            dim=args.hidden_dim,
            num_heads=args.nheads,
            num_encoder_layers=args.enc_layers,
            num_decoder_layers=args.dec_layers,
            dim_feedforward=args.dim_feedforward,
            dropout=args.dropout,
            checkpoint_activations=getattr(args, "checkpoint_activations", False),
        ),
        dim=args.hidden_dim,
        num_classes=getattr(args, "num_classes", None) or COCO_NUM_CLASSES,
        num_queries=args.num_queries,
        aux_loss=args.aux_loss,
    )
    matcher = HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, args.focal_alpha)
    criterion = SetCriterion(
        matcher,
        loss_weights={
            "loss_ce": args.cls_loss_coef,
            "loss_bbox": args.bbox_loss_coef,
            "loss_giou": args.giou_loss_coef,
        },
        num_layers=args.dec_layers if args.aux_loss else 1,
        focal_alpha=args.focal_alpha,
    )
    return model, criterion, {"bbox": PostProcess(getattr(args, "max_detections", 100))}


def trained_part(args: argparse.Namespace) -> str:
    """Which part of the backbone learns: nothing at `--lr_backbone 0`, all of it where no weights are given."""
    if args.lr_backbone <= 0:
        return "none"
    return "all" if getattr(args, "backbone_weights", "imagenet") == "none" else "late"
