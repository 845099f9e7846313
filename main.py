"""Trains and evaluates Conditional DETR: the story of a run.

Usage:
    python main.py --coco_path /path/to/coco --output_dir output/run
    python main.py --coco_path /path/to/coco --eval --resume checkpoint.pth
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from termcolor import colored
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from datasets import build_dataset, build_loader, get_coco_api_from_dataset
from datasets.coco import CocoDetection
from datasets.coco_eval import evaluation_as_plain_data
from engine import evaluate, train_one_epoch
from models import build_model
from models.backbone import load_backbone_weights
from util.args import check_args, get_args_parser
from util.checkpoint import load_model_weights, save_on_master
from util.distributed import get_rank, get_world_size, init_distributed_mode, is_main_process, leave_process_group
from util.errors import InputError
from util.log_file import append_log, trim_log
from util.logger import log, warn
from util.optim import build_optimizer, build_schedule, restore_optimizer
from util.preemption import EXIT_CODE, Preempted, noticing_signals
from util.progress import Progress
from util.resume import choose_num_classes, first_epoch, holds_training, read_checkpoint, unlogged_epoch
from util.rng import seed_everything
from util.step_guard import StepGuard


def main(args: argparse.Namespace) -> None:
    """Trains, or with `args.eval` only evaluates, as the flags say.

    Raises:
        InputError: for flags, files and annotations that are not usable; before any long work where that can be known.
        Preempted: where a signal asked the run to end.
    """
    check_args(args)
    init_distributed_mode(args)
    if args.deterministic:
        use_deterministic_kernels()
    device = torch.device(args.device)
    seed_everything(args.seed + get_rank())
    output_dir = make_output_dir(args.output_dir)

    checkpoint, source = read_checkpoint(args)
    if checkpoint and not args.eval:
        args.start_epoch = first_epoch(checkpoint, source, args)
        if args.start_epoch >= args.epochs and not unlogged_epoch(checkpoint, source, output_dir):
            log(f"finished: {source} has all {args.epochs} epochs; raise --epochs to train on", "green")
            return

    dataset_train = None if args.eval else build_dataset("train", args)
    dataset_val = build_dataset("val", args)
    args.num_classes = choose_num_classes(args, checkpoint, source, (dataset_train or dataset_val).num_classes)
    for dataset in filter(None, (dataset_train, dataset_val)):
        dataset.check_classes(args.num_classes)
    loader_train = dataset_train and build_loader(dataset_train, args, train=True)
    loader_val = build_loader(dataset_val, args, train=False)

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

    def evaluate_val() -> tuple[dict[str, Any], Any]:
        base_ds = get_coco_api_from_dataset(dataset_val)
        return evaluate(
            parallel_model, criterion, postprocessors, loader_val, base_ds, device, args.output_dir, args.amp
        )

    if args.eval:
        _, evaluator = evaluate_val()
        if output_dir:
            save_on_master(evaluation_as_plain_data(evaluator.coco_eval["bbox"]), output_dir / "eval.pth")
        return

    optimizer = build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    lr_scheduler = build_schedule(optimizer, args.lr_drop, args.start_epoch)
    progress = Progress(torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"))
    seed_everything(args.seed + get_rank())  # what was drawn so far depends on where the weights come from
    if checkpoint and holds_training(checkpoint):
        restore_optimizer(optimizer, checkpoint["optimizer"], source)
        progress.restore(checkpoint, args.batch_size)
    if output_dir:
        trim_log(output_dir / "log.txt", args.start_epoch)

    def save(epoch: int, **more: Any) -> None:
        """Writes all that it takes to go on; `epoch` is the last finished one."""
        if output_dir:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
                "args": vars(args),
                "class_names": dataset_train.class_names,
            }
            save_checkpoints(output_dir, state | progress.state_dict() | more, args.lr_drop)

    def finish_epoch(epoch: int, entry: dict[str, Any]) -> None:
        """Evaluates, and completes the epoch's line in the log."""
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            with stop_request.at_once():
                stats, _ = evaluate_val()
            entry |= {f"test_{name}": value for name, value in stats.items()}
        if output_dir:
            append_log(output_dir / "log.txt", entry | {"epoch": epoch, "n_parameters": count_parameters(model)[1]})

    start = time.time()
    with noticing_signals() as stop_request:
        guard = StepGuard(model, args.skip_nonfinite, output_dir, {"args": vars(args)}, stop_request)

        def save_if_due() -> None:
            """Behind a step: every `--save_every` of them, and at the end that a signal asks for."""
            due = args.save_every and progress.step % args.save_every == 0 and progress.step < len(loader_train)
            if due or guard.stopping:
                guard.settle(progress)
                save(epoch - 1)
            if guard.stopping:
                raise Preempted

        if unlogged_epoch(checkpoint, source, output_dir):
            finish_epoch(checkpoint["epoch"], checkpoint["train_stats"])
        for epoch in range(args.start_epoch, args.epochs):
            dataset_train.set_epoch(epoch)
            loader_train.sampler.set_epoch(epoch, progress.step * args.batch_size)
            stats = train_one_epoch(
                parallel_model,
                criterion,
                loader_train,
                optimizer,
                device,
                epoch,
                args.clip_max_norm,
                args.amp,
                progress,
                guard,
                save_if_due,
            )
            entry = {f"train_{name}": value for name, value in stats.items()}
            lr_scheduler.step()
            progress.start_epoch()
            save(epoch, train_stats=entry)
            if guard.stopping:
                raise Preempted
            finish_epoch(epoch, entry)
    log(f"training took {timedelta(seconds=int(time.time() - start))}", "green")


def use_deterministic_kernels() -> None:
    """The same numbers from the same machine every time, also on GPUs, where sums otherwise depend on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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
    on_cuda = torch.device(args.device).type == "cuda"
    if trained_norms and on_cuda:  # torch synchronises batch norms on GPUs only
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    parallel_model = DistributedDataParallel(
        model, device_ids=[args.gpu] if on_cuda else None, broadcast_buffers=trained_norms
    )
    if not args.eval:
        settle_buckets(parallel_model)
    return parallel_model


def settle_buckets(model: DistributedDataParallel) -> None:
    """Takes a step that changes nothing, behind which DistributedDataParallel lays out its gradient buckets anew.

    The layout decides the order in which gradients are summed; a resumed run is to begin with that of the run that it
    goes on with.
    """
    parameter = next(model.parameters())
    outputs = model.eval()(torch.zeros(1, 3, 64, 64, device=parameter.device))
    (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
    model.zero_grad()


def save_checkpoints(output_dir: Path, checkpoint: dict[str, Any], lr_drop: int) -> None:
    """checkpoint.pth and the one before it; one that stays at each drop of the learning rate and every 10 epochs."""
    save_on_master(checkpoint, output_dir / "checkpoint.pth", keep_old_as=output_dir / "checkpoint_previous.pth")
    epochs = checkpoint["epoch"] + 1
    if checkpoint["step"] == 0 and (epochs % lr_drop == 0 or epochs % 10 == 0):
        save_on_master(checkpoint, output_dir / f"checkpoint{epochs - 1:04}.pth")


@record  # so that torchrun shows what ended a process
def run() -> None:
    """The command line: a mistake of the user ends in one line, a request to end the run in its own exit code."""
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
        process = f"process {get_rank()}: " if get_world_size() > 1 else ""
        sys.exit(colored("error: ", "red", no_color=not sys.stderr.isatty()) + process + error.line)
    except Preempted:
        log(f"ended on request (exit code {EXIT_CODE}); --resume auto goes on from here", "yellow")
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    run()
