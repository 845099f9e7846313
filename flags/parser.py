"""Flags of the command line, and checks of their values before any file is read.

This module imports nothing slow, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from flags.limits import (
    BACKBONES,
    check_device_name,
    check_model,
    check_numbers,
    check_sizes,
    check_texts,
    resolve_device,
)
from util import launcher
from util.command import Parser
from util.errors import InputError

# Defaults that depend on the model. The parser has the published defaults of Conditional DETR; for another model,
# `flags.resolve` replaces the defaults of the flags that are not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "conditional_detr": {},
    "detr": {"num_queries": 100, "epochs": 300, "lr_drop": 200, "set_cost_class": 1, "cls_loss_coef": 1},
}
MODELS = tuple(DEFAULTS)
MAX_AUTO_WORKERS = 16  # more workers do not feed a GPU faster


def worker_count(text: str) -> int:
    """Return a number of data-loading processes; for "auto", one per CPU of this process, at most `MAX_AUTO_WORKERS`.

    The processes that torchrun starts on a node share its CPUs; tasks of srun have CPUs of their own.
    """
    if text != "auto":
        return int(text)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        processes = launcher.number("LOCAL_WORLD_SIZE", 1, least=1)
    except InputError as error:  # argparse drops the message of a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error
    return min(max(cpus // processes, 1), MAX_AUTO_WORKERS)


def of_detr(flag: str) -> str:
    """Return the part of a help text that gives DETR's default."""
    return f"; {DEFAULTS['detr'][flag]} for --model detr"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags; flags of the published code keep their names and defaults."""
    parser = Parser("Conditional DETR and DETR", add_help=False)
    add = parser.add_argument_group("training").add_argument
    add("--lr", default=1e-4, type=float, help="learning rate")
    add("--lr_backbone", default=1e-5, type=float, help="learning rate of the backbone; 0 freezes it")
    add("--batch_size", default=2, type=int, help="images per process and step")
    add("--weight_decay", default=1e-4, type=float, help="weight decay")
    add("--epochs", default=50, type=int, help="epochs to train" + of_detr("epochs"))
    add(
        "--lr_drop",
        default=40,
        type=int,
        help="multiply learning rates by 0.1 every N epochs" + of_detr("lr_drop"),
    )
    add(
        "--lr_schedule",
        default="step",
        choices=("step", "linear"),
        help="step: learning rates drop every --lr_drop epochs; linear: they decrease each epoch, to 0 after --epochs",
    )
    add("--clip_max_norm", default=0.1, type=float, help="maximum total norm of the gradients; 0: no clipping")

    add(
        "--lr_scale",
        default="none",
        choices=("none", "sqrt", "linear"),
        help="multiply the learning rates by images per step / 16, the recipes' number (linear), or by its root (sqrt)",
    )
    add("--accum_steps", default=1, type=int, help="batches per optimizer step, whose gradients are accumulated")
    add(
        "--ema_decay",
        default=0,
        type=float,
        metavar="D",
        help="evaluate and save an exponential moving average of the weights with this decay, such as 0.999; 0: off",
    )
    add("--amp", default="none", choices=("none", "bf16", "fp16"), help="precision of the model's forward pass")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="conditional_detr", choices=MODELS, help="model to train or evaluate")
    add("--backbone", default="resnet50", help=f"one of {', '.join(BACKBONES)}")
    add("--dilation", action="store_true", help="DC5: dilate the last stage instead of striding it")
    add("--backbone_weights", default="imagenet", help="imagenet, none, or a file with torchvision's weights")
    add(
        "--backbone_norm",
        default="frozen",
        choices=("frozen", "batch"),
        help="frozen: constant batch norms; batch: trained",
    )
    add("--position_embedding", default="sine", choices=("sine", "learned"), help="position encoding of image features")
    add("--enc_layers", default=6, type=int, help="encoder layers")
    add("--dec_layers", default=6, type=int, help="decoder layers")
    add("--dim_feedforward", default=2048, type=int, help="hidden width of the feed-forward networks")
    add("--hidden_dim", default=256, type=int, help="width of the transformer")
    add("--dropout", default=0.1, type=float, help="dropout in the transformer")
    add("--nheads", default=8, type=int, help="attention heads")
    add("--num_queries", default=300, type=int, help="object queries" + of_detr("num_queries"))
    add("--group_detr", default=1, type=int, metavar="G", help="Group DETR: groups of queries in training; 1: off")
    add("--pre_norm", action="store_true", help="not supported: the norms come after the residual sums")
    add(
        "--num_classes",
        default=None,
        type=int,
        help="logits of the class head; unset: as in the checkpoint, else as the data needs",
    )

    add = parser.add_argument_group("segmentation").add_argument
    add("--masks", action="store_true", help="add a mask head, and train it with the model")
    add(
        "--frozen_weights",
        default=None,
        metavar="DETECTOR",
        help="checkpoint of a model without masks; its weights are frozen, and only the mask head is trained",
    )

    add = parser.add_argument_group("losses and matching").add_argument
    add(
        "--max_detections",
        default=100,
        type=int,
        help="maximum number of detections per image; above 100, AP is also printed at this number",
    )
    add("--no_aux_loss", dest="aux_loss", action="store_false", help="no losses for decoder layers before the last")
    add(
        "--set_cost_class",
        default=2,
        type=float,
        help="weight of the class in the matching cost" + of_detr("set_cost_class"),
    )
    add("--set_cost_bbox", default=5, type=float, help="weight of the L1 distance in the matching cost")
    add("--set_cost_giou", default=2, type=float, help="weight of the generalised IoU in the matching cost")
    add("--mask_loss_coef", default=1, type=float, help="weight of the focal loss of masks")
    add("--dice_loss_coef", default=1, type=float, help="weight of the Dice loss of masks")
    add("--cls_loss_coef", default=2, type=float, help="weight of the class loss" + of_detr("cls_loss_coef"))
    add("--bbox_loss_coef", default=5, type=float, help="weight of the L1 loss")
    add("--giou_loss_coef", default=2, type=float, help="weight of the generalised IoU loss")
    add("--focal_alpha", default=0.25, type=float, help="Conditional DETR's focal loss: weight of positives")
    add("--eos_coef", default=0.1, type=float, help="DETR's cross-entropy: weight of 'no object'")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_file", default="coco", help="kind of data set: coco, or coco_panoptic")
    add("--coco_path", default=None, help="folder with annotations/ and images/")
    for split in ("train", "val"):
        add(f"--{split}_images", default=None, help=f"folder of the {split} images, instead of the one in --coco_path")
        add(
            f"--{split}_annotations",
            default=None,
            help=f"COCO JSON file of the {split} images, instead of the one in --coco_path",
        )
    add("--coco_panoptic_path", default=None, help="folder with panoptic annotations/ and PNG files")
    add("--remove_difficult", action="store_true", help="leave out annotations marked 'difficult'")
    add(
        "--on_bad_image",
        default="error",
        choices=("error", "skip"),
        help="for an image that cannot be decoded or does not have its annotated size: stop, or use the next image",
    )
    add(
        "--max_megapixels",
        default=100,
        type=int,
        help="size of the largest image that is accepted; larger JPEGs are decoded at a reduced size",
    )
    add(
        "--min_size", default=800, type=int, help="short side of images in evaluation; training sizes are in proportion"
    )
    add("--max_size", default=1333, type=int, help="maximum long side of images")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="", help="folder for checkpoints and logs; empty: nothing is saved")
    add("--device", default="auto", type=resolve_device, help="cuda, cuda:N, cpu, or auto: a GPU if there is one")
    add("--seed", default=42, type=int, help="seed of initial weights, image order and augmentation")
    add(
        "--resume",
        default="",
        help="checkpoint to resume from: path, URL, hub name, or auto (the latest in --output_dir)",
    )
    add(
        "--finetune",
        default="",
        help="start from the weights of another model that fit this one: path, URL or hub name",
    )
    add("--overfit", default=0, type=int, metavar="N", help="train and evaluate on the first N training images only")
    add("--start_epoch", default=0, type=int, help="first epoch, unless a checkpoint sets it")
    add(
        "--compile",
        action="store_true",
        help="compile the transformer with torch.compile; some early steps take minutes",
    )
    add("--checkpoint_activations", action="store_true", help="save memory in training by computing activations twice")
    add("--save_every", default=0, type=int, help="also write checkpoint.pth every N steps; 0: only after each epoch")
    add(
        "--skip_nonfinite",
        default=0,
        type=int,
        help="number of steps with infinite or NaN losses to skip; one more ends the run",
    )
    add("--deterministic", action="store_true", help="make runs reproducible on GPUs, too; slower")
    add("--eval", action="store_true", help="evaluate only")
    add(
        "--image_set",
        default="val",
        choices=("val", "test"),
        help="images for --eval; test: COCO's test-dev, for which detections are written for COCO's server",
    )
    add("--eval_every", default=1, type=int, help="evaluate every N epochs, and after the last one")
    add(
        "--patience",
        default=0,
        type=int,
        metavar="N",
        help="end training after N evaluations without a better AP; 0: never",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write curves and pictures of training to --output_dir for TensorBoard",
    )
    add(
        "--num_workers",
        default=2,
        type=worker_count,
        help=f"data-loading processes per training process; auto: one per available CPU, at most {MAX_AUTO_WORKERS}",
    )
    add("--world_size", default=1, type=int, help="set by the launcher")
    add("--dist_url", default="env://", help="address at which the processes connect")
    add("--local-rank", "--local_rank", dest="local_rank", default=None, type=int, help=argparse.SUPPRESS)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for flags that are not supported, have wrong values or contradict each other.

    The check is fast, because it looks at neither files nor the machine.
    """
    if args.coco_panoptic_path is not None and args.dataset_file != "coco_panoptic":
        raise InputError(
            "--coco_panoptic_path: panoptic data needs --dataset_file coco_panoptic; add it, or drop the flag"
        )
    if args.frozen_weights is not None and not args.masks:
        raise InputError("--frozen_weights names the detector for a mask head: add --masks, or drop the flag")
    if args.frozen_weights is not None and args.finetune:
        raise InputError("--frozen_weights and --finetune both name the weights to start from: drop one")
    check_numbers(args)
    for flag in ("mask_loss_coef", "dice_loss_coef"):
        if getattr(args, flag) != 1 and not args.masks:
            value = f"{getattr(args, flag):g}"
            raise InputError(f"--{flag} {value}: only a model with masks has this loss; add --masks, or drop the flag")
    check_texts({f"--{flag}": value for flag, value in vars(args).items()})
    check_device_name(args.device)
    check_model(args)
    check_sizes(args)
    if not args.eval:
        check_learns(args)
    if args.finetune and (args.eval or args.resume not in ("", "auto")):
        raise InputError(
            "--finetune starts a new training: do not combine it with --eval or --resume, except --resume auto; "
            "to evaluate or resume a model, name it with --resume alone"
        )
    if args.resume == "auto" and not args.output_dir:
        raise InputError("--resume auto looks for checkpoints in --output_dir: add that flag")
    if args.image_set == "test" and (args.overfit or not (args.eval and args.output_dir)):
        raise InputError("--image_set test only writes detections: add --eval and --output_dir, without --overfit")
    if args.tensorboard and not args.output_dir:
        raise InputError("--tensorboard writes to --output_dir: add that flag")


def check_learns(args: argparse.Namespace) -> None:
    """Raise InputError for flags with which training would leave the weights unchanged, or destroy them."""
    if args.lr == args.lr_backbone == 0:
        raise InputError("--lr 0 with --lr_backbone 0: nothing would be trained; raise one of them")
    if args.cls_loss_coef == args.bbox_loss_coef == args.giou_loss_coef == 0:
        raise InputError(
            "--cls_loss_coef, --bbox_loss_coef and --giou_loss_coef are all 0: nothing would be trained; "
            "raise one of them"
        )
    if max(args.lr, args.lr_backbone) * args.weight_decay >= 1:
        raise InputError(f"--weight_decay {args.weight_decay}: its product with the learning rate must be less than 1")


def command_line(flags: argparse.Namespace) -> argparse.Namespace:
    """Read main.py's command line into a namespace, whose values so far serve as defaults; return it."""
    parser = Parser(
        "main.py",
        usage="%(prog)s --coco_path PATH [flags]",
        description="Train and evaluate Conditional DETR and DETR.",
        parents=[get_args_parser()],
    )
    return parse_flags(parser, None, flags)


def check_command_line(flags: argparse.Namespace) -> None:
    """Read the command line like `command_line`, and check it by `check_args`."""
    check_args(command_line(flags))


class ParsedFlags(argparse.Namespace):
    """Flags of a command line; `given` holds the names of the flags that the command line sets."""

    __slots__ = ("given",)  # not in `vars`, which checkpoints store


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, flags: argparse.Namespace
) -> argparse.Namespace:
    """Read a command line into a namespace, and record which flags the command line sets."""
    flags = parser.parse_args(argv, flags)
    unset = object()
    probe = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags), unset)))
    flags.given = frozenset(name for name, value in vars(probe).items() if value is not unset)
    return flags
