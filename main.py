"""Trains and evaluates Conditional DETR: the story of a run.

Usage:
    python main.py --coco_path /path/to/coco --output_dir output/run
    python main.py --coco_path /path/to/coco --eval --resume checkpoint.pth
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from termcolor import colored
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import build_dataset, build_loader, get_coco_api_from_dataset
from datasets.coco import CocoDetection
from datasets.coco_eval import evaluation_as_plain_data
from engine import evaluate, train_one_epoch
from models import build_model
from models.backbone import load_backbone_weights
from util.args import check_args, get_args_parser
from util.checkpoint import (
    TRAINING_FLAGS,
    changed_flags,
    check_model_flags,
    load_checkpoint,
    load_latest_checkpoint,
    load_model_weights,
    num_classes_of,
    save_on_master,
)
from util.distributed import get_rank, get_world_size, init_distributed_mode, is_main_process, leave_process_group
from util.errors import InputError
from util.logger import append_log, log, trim_log, warn
from util.optim import build_optimizer, build_schedule, restore_optimizer


def main(args: argparse.Namespace) -> None:
    """Trains, or with `args.eval` only evaluates, as the flags say.

    Raises:
        InputError: for flags, files and annotations that are not usable; before any long work where that can be known.
    """
    check_args(args)
    init_distributed_mode(args)
    device = torch.device(args.device)
    seed_everything(args.seed + get_rank())
    output_dir = make_output_dir(args.output_dir)

    checkpoint, source = read_checkpoint(args)
    if checkpoint and not args.eval:
        args.start_epoch = first_epoch(checkpoint, source, args)
        if args.start_epoch >= args.epochs:
            log(f"finished: {source} has all {args.epochs} epochs; raise --epochs to train on", "green")
            return

    dataset_train = None if args.eval else build_dataset("train", args)
    dataset_val = build_dataset("val", args)
    args.num_classes = choose_num_classes(args, checkpoint, source, dataset_train or dataset_val)
    for dataset in filter(None, (dataset_train, dataset_val)):
        dataset.check_classes(args.num_classes)
    loader_train = dataset_train and build_loader(dataset_train, args, train=True)
    loader_val = build_loader(dataset_val, args, train=False)
    base_ds = get_coco_api_from_dataset(dataset_val)

    model, criterion, postprocessors = build_model(args)
    if checkpoint:
        load_model_weights(model, checkpoint, source)
    elif args.eval:
        warn("evaluating random weights: name a checkpoint with --resume")
    elif args.backbone_weights != "none" and is_main_process():  # the other processes are sent the model's weights
        load_backbone_weights(model.backbone[0], args.backbone, args.backbone_weights)
    print_summary(args, model, dataset_train, dataset_val)
    model.to(device)
    parallel_model = distribute(model, args)

    if args.eval:
        _, evaluator = evaluate(parallel_model, criterion, postprocessors, loader_val, base_ds, device, args.output_dir)
        if output_dir:
            save_on_master(evaluation_as_plain_data(evaluator.coco_eval["bbox"]), output_dir / "eval.pth")
        return

    optimizer = build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    if checkpoint and holds_training(checkpoint):
        restore_optimizer(optimizer, checkpoint["optimizer"], source)
    lr_scheduler = build_schedule(optimizer, args.lr_drop, args.start_epoch)
    if output_dir:
        trim_log(output_dir / "log.txt", args.start_epoch)

    start = time.time()
    for epoch in range(args.start_epoch, args.epochs):
        dataset_train.set_epoch(epoch)
        loader_train.sampler.set_epoch(epoch)
        stats = train_one_epoch(parallel_model, criterion, loader_train, optimizer, device, epoch, args.clip_max_norm)
        entry = {f"train_{name}": value for name, value in stats.items()}
        lr_scheduler.step()
        if output_dir:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
                "args": vars(args),
                "class_names": dataset_train.class_names,
            }
            save_checkpoints(output_dir, epoch, state, args.lr_drop)
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            stats, _ = evaluate(parallel_model, criterion, postprocessors, loader_val, base_ds, device, args.output_dir)
            entry |= {f"test_{name}": value for name, value in stats.items()}
        if output_dir:
            append_log(output_dir / "log.txt", entry | {"epoch": epoch, "n_parameters": count_parameters(model)[1]})
    log(f"training took {timedelta(seconds=int(time.time() - start))}", "green")


def seed_everything(seed: int) -> None:
    """Seeds every generator that a library might draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def make_output_dir(name: str) -> Path | None:
    """The folder of `--output_dir`, made if need be; None where nothing is to be saved."""
    if not name:
        return None
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder}: not writable")
    return folder


def read_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """The checkpoint that `--resume` names, and where it came from; (None, "") where there is none."""
    if args.resume == "auto":
        found = load_latest_checkpoint(args.output_dir, warn)
        if found is None:
            log(f"--resume auto: no checkpoint in {args.output_dir}, starting anew")
            return None, ""
        checkpoint, source = found[0], str(found[1])
    elif args.resume:
        checkpoint, source = load_checkpoint(args.resume), args.resume
    else:
        return None, ""
    check_model_flags(args, checkpoint, source)
    if not args.eval and (changed := changed_flags(args, checkpoint, TRAINING_FLAGS)):
        warn(f"going on from {source} with other flags: {'; '.join(changed)}")
    epoch = f", {checkpoint['epoch'] + 1} epochs trained" if "epoch" in checkpoint else ""
    log(f"loading {source}{epoch}")
    return checkpoint, source


def holds_training(checkpoint: dict[str, Any]) -> bool:
    """Whether training can go on from a checkpoint; else its model is where a new one starts."""
    return "optimizer" in checkpoint and "epoch" in checkpoint


def first_epoch(checkpoint: dict[str, Any], source: str, args: argparse.Namespace) -> int:
    """Where training goes on: behind the checkpoint's epoch, or at `--start_epoch` where it holds only a model."""
    if holds_training(checkpoint):
        return checkpoint["epoch"] + 1
    warn(f"{source} holds a model but no state of the training: its weights are where a new run starts")
    return args.start_epoch


def choose_num_classes(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, source: str, dataset: CocoDetection
) -> int:
    """The size of the class head: the checkpoint's, else `--num_classes`, else what the data needs."""
    if checkpoint is None:
        return dataset.num_classes if args.num_classes is None else args.num_classes
    stored = num_classes_of(checkpoint, source)
    if args.num_classes not in (None, stored):
        raise InputError(f"--num_classes {args.num_classes} contradicts the {stored} classes of {source}")
    return stored


def print_summary(
    args: argparse.Namespace, model: nn.Module, dataset_train: CocoDetection | None, dataset_val: CocoDetection
) -> None:
    """What is about to happen to what."""
    for name, dataset in (("train", dataset_train), ("val", dataset_val)):
        if dataset is not None:
            log(f"{name + ':':<7}{dataset.summary()}")
    total, trained = count_parameters(model)
    log(
        f"model: {total:,} parameters, {0 if args.eval else trained:,} of them trained; {args.backbone}"
        f"{' dilated' if args.dilation else ''}, {args.num_queries} queries, class ids 0 to {args.num_classes - 1}"
    )
    if not args.eval:
        world_size = get_world_size()
        log(f"batch: {args.batch_size} images × {world_size} processes = {args.batch_size * world_size} a step")
        if args.backbone_weights == "none" and args.backbone_norm == "frozen" and not args.resume:
            warn("a backbone without pretrained weights hardly learns with frozen norms: add --backbone_norm batch")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trained ones."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def distribute(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model as it trains on several processes, all with the weights of the first; alone it stays as it is."""
    if not args.distributed:
        return model
    trained_norms = args.backbone_norm == "batch"
    if torch.device(args.device).type != "cuda":  # torch synchronises batch norms on GPUs only
        return DistributedDataParallel(model, broadcast_buffers=trained_norms)
    if trained_norms:
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    return DistributedDataParallel(model, device_ids=[args.gpu], broadcast_buffers=trained_norms)


def save_checkpoints(output_dir: Path, epoch: int, checkpoint: dict[str, Any], lr_drop: int) -> None:
    """checkpoint.pth after every epoch; one that stays before each drop of the learning rate and every 10 epochs."""
    save_on_master(checkpoint, output_dir / "checkpoint.pth")
    if (epoch + 1) % lr_drop == 0 or (epoch + 1) % 10 == 0:
        save_on_master(checkpoint, output_dir / f"checkpoint{epoch:04}.pth")


def run() -> None:
    """The command line: a mistake of the user ends in one line."""
    parser = argparse.ArgumentParser(
        "main.py",
        usage="%(prog)s --coco_path PATH [flags]",
        description="Trains and evaluates Conditional DETR.",
        parents=[get_args_parser()],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    try:
        main(parser.parse_args())
        leave_process_group()
    except InputError as error:
        sys.exit(colored("error: ", "red", no_color=not sys.stderr.isatty()) + error.line)


if __name__ == "__main__":
    run()
