"""Trains and evaluates Conditional DETR: the story of a run.

Usage:
    python main.py --coco_path /path/to/coco --output_dir output/run
    python main.py --coco_path /path/to/coco --eval --resume checkpoint.pth
"""

from __future__ import annotations

from flags.parser import Flags, check_args, check_command_line, command_line, get_args_parser
from util.command import answer_early
from util.orphans import end_with_launcher
from util.preemption import EXIT_CODE, Stopped, end_now, ignore_signals, kill_workers, stop_request

if __name__ == "__main__":  # the imports below take seconds
    stop_request.install(EXIT_CODE, importing=True)
    end_with_launcher()
    answer_early(check_command_line)

import argparse
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from checkpoints.backbone_weights import load_backbone_weights
from checkpoints.checkpoint import classes_of, load_checkpoint, load_model_weights
from datasets import build_dataset, build_loader
from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.odd_boxes import crowded_images
from engine import detect, evaluate
from evaluation.mistakes import draw_examples
from evaluation.report import write_report, write_test_results
from flags.limits import check_device
from models import build_model
from run.advice import advice, lr_factor
from run.finetune import start_from
from run.kernels import compile_model, use_deterministic_kernels, use_fast_kernels
from run.log_file import trim_log
from run.output_folder import claim_output_dir
from run.resume import (
    choose_num_classes,
    first_epoch,
    holds_training,
    how_to_resume,
    read_checkpoint,
    unlogged_epoch,
)
from run.summary import summary
from run.tensorboard import TensorBoard
from training import TrainingRun, count_parameters, images_a_step
from util.command import error_line, ignore_image_warnings, need, replace_unprintable_characters
from util.distributed import (
    distribute,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave_process_group,
)
from util.errors import InputError, is_lost_peer, what_to_do
from util.logger import log, warn
from util.rng import seed_everything
from util.text import counted

__all__ = ["get_args_parser", "main", "run"]


def main(args: argparse.Namespace) -> None:
    """Train, or with `args.eval` only evaluate, as the flags say.

    With `args.resume`, the flags of the model come from the checkpoint. Those that were given must agree with it: the
    flags that the command line sets and, in a namespace that Python code made, those that differ from their default.

    Raises:
        InputError: for flags, files and annotations that are not usable; before any long work where that can be known.
        Stopped: where a signal asked the run to stop.
    """
    device = set_up(args)
    with claim_output_dir(args) as output_dir:
        train_or_evaluate(args, device, output_dir)


def train_or_evaluate(args: argparse.Namespace, device: torch.device, output_dir: Path | None) -> None:
    """Do what `main` says, in an output folder that no other run uses."""
    checkpoint, source = read_checkpoint(args)
    unlogged = unlogged_epoch(checkpoint, source, output_dir)
    if checkpoint and not args.eval:
        args.start_epoch = first_epoch(checkpoint, source, args)
        if args.start_epoch >= args.epochs and holds_training(checkpoint) and not unlogged:
            log(
                f"finished: {source} has the {counted(args.epochs, 'epoch')} asked for; raise --epochs to train on",
                "green",
            )
            return
    if not args.eval and args.start_epoch >= args.epochs and not unlogged:
        raise InputError(
            f"--start_epoch {args.start_epoch}: the run has only {counted(args.epochs, 'epoch')}, counted from 0"
        )
    start = load_checkpoint(args.finetune) if args.finetune and not checkpoint else None

    dataset_train, dataset_val, classes = load_data(args, checkpoint, source)
    loader_train = dataset_train and build_loader(dataset_train, args, train=True)
    loader_val = build_loader(dataset_val, args, train=False)
    if not args.eval:
        check_trains(args, loader_train)
    all_classes = classes | dataset_val.classes  # the model may know others than this data has, and the other way round

    model, criterion, postprocessors = build_model(args)
    if checkpoint:
        load_model_weights(model, checkpoint, source)
    elif args.eval:
        warn("evaluating random weights: name a checkpoint with --resume")
    elif is_main_process():  # the other processes are sent the model's weights
        has_backbone = start and start_from(model, classes, start, args.finetune, args)
        if args.backbone_weights != "none" and not has_backbone:
            load_backbone_weights(model.backbone[0], args.backbone, args.backbone_weights)
    print_summary(args, model, dataset_train, dataset_val)
    if not args.eval:
        print_training(args, loader_train, from_scratch=not (checkpoint or start))
    model.to(device)
    if args.compile:
        compile_model(model)
    parallel_model = distribute(model, device, args.distributed, args.backbone_norm == "batch", trains=not args.eval)

    arrays_dir = "" if args.eval else args.output_dir  # eval/ is the training run's, which may use the folder, too

    def evaluate_val() -> tuple[dict[str, Any], CocoEvaluator]:
        base_ds = dataset_val.ground_truth()
        return evaluate(parallel_model, criterion, postprocessors, loader_val, base_ds, device, arrays_dir, args.amp)

    if args.eval and args.image_set == "test":
        found = detect(parallel_model, postprocessors, loader_val, dataset_val.ground_truth(), device, args.amp)
        write_test_results(found, all_classes, output_dir)
        return
    if args.eval:
        _, evaluator = evaluate_val()
        if output_dir:
            write_report(evaluator, dataset_val, all_classes, output_dir)
        return

    start_time = time.time()
    board_dir = output_dir / "tensorboard" if args.tensorboard and is_main_process() else None
    board = TensorBoard(board_dir, partial(draw_examples, dataset_val, all_classes))
    with stop_request.deferred(), board:
        run = TrainingRun(
            args, model, parallel_model, criterion, loader_train, evaluate_val, output_dir, stop_request, board
        )
        if checkpoint and holds_training(checkpoint):
            run.restore(checkpoint, source)
        if output_dir:
            trim_log(output_dir / "log.txt", args.start_epoch)
        board.begin(args.start_epoch - unlogged, run.steps_done(args.start_epoch))
        if unlogged:
            run.finish_epoch(checkpoint["epoch"], checkpoint["train_stats"])
        for epoch in range(args.start_epoch, args.epochs):
            run.train_epoch(epoch)
    log(f"training took {timedelta(seconds=int(time.time() - start_time))}", "green")
    if output_dir:
        log("\n".join(summary(args, vars(get_args_parser().parse_args([])), output_dir)))


def set_up(args: argparse.Namespace) -> torch.device:
    """Checks the flags, joins the other processes, seeds, and chooses kernels; returns the device."""
    check_args(args)
    check_device(args.device)
    if args.tensorboard:
        need("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    init_distributed_mode(args)
    device = torch.device(args.device)
    seed_everything(args.seed + get_rank())
    use_fast_kernels(device)
    if args.deterministic:
        use_deterministic_kernels()
    return device


def load_data(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, source: str
) -> tuple[CocoDetection | None, CocoDetection, Classes]:
    """The training data (None to evaluate), those to evaluate on, and the model's classes.

    The classes are those of the checkpoint, else those of the first of the two data sets. Sets `args.num_classes`.
    """
    known = checkpoint and classes_of(checkpoint, source)
    train = None if args.eval else build_dataset("train", args, known, share=True)
    val = build_dataset(args.image_set, args, known or (train and train.classes), share=True)
    classes = known or (train or val).classes
    args.num_classes = choose_num_classes(args, checkpoint, source, classes.num_labels)
    for dataset in filter(None, (train, val)):
        dataset.check_classes(args.num_classes)
    return train, val, classes


def check_trains(args: argparse.Namespace, loader: DataLoader) -> None:
    """Raise InputError for data from which nothing would be learned, and warn about too few for one batch."""
    dataset = loader.dataset
    dataset.check_trains()
    if args.accum_steps > len(loader):
        raise InputError(
            f"--accum_steps {args.accum_steps}: an epoch has only {counted(len(loader), 'batch')}; lower it"
        )
    if (images := len(set(dataset.ids))) < args.batch_size * get_world_size():
        warn(
            f"--overfit {args.overfit}: a batch of {counted(args.batch_size, 'image')} repeats the {images} with boxes"
        )


def print_summary(
    args: argparse.Namespace, model: nn.Module, dataset_train: CocoDetection | None, dataset_val: CocoDetection
) -> None:
    """What is about to happen to what."""
    for name, dataset in (("train", dataset_train), (args.image_set, dataset_val)):
        if dataset is not None:
            log(f"{name + ':':<7}{dataset.summary()}")
            for line in crowded_images(dataset.objects_per_image(), args.num_queries, args.max_detections):
                warn(f"{name}: {line}")
    if args.image_set == "val" and not dataset_val.summary().boxes:
        warn(f"{dataset_val.annotation_file} has no boxes: AP cannot be measured, and no best checkpoint is kept")
    total, trained = count_parameters(model)
    log(
        f"model: {total:,} parameters, {0 if args.eval else trained:,} of them trained; {args.backbone}"
        f"{' dilated' if args.dilation else ''}, {counted(args.num_queries, 'query')}, "
        f"class ids 0 to {args.num_classes - 1}"
    )


def print_training(args: argparse.Namespace, loader: DataLoader, from_scratch: bool) -> None:
    """How much is about to be learnt from, and what can be said against it."""
    accumulated = f" × {args.accum_steps} batches" if args.accum_steps > 1 else ""
    images = images_a_step(args)
    steps = len(loader) // args.accum_steps * args.epochs
    log(
        f"training: {counted(args.batch_size, 'image')} × {counted(get_world_size(), 'process')}{accumulated} = "
        f"{images} a step; {counted(args.epochs, 'epoch')}, {counted(steps, 'step')}; "
        f"learning rate {args.lr * lr_factor(args, images):.3g}"
    )
    if args.overfit:
        log(f"overfitting: {counted(args.overfit, 'image')}, each many times an epoch, without augmentation")
    if not args.output_dir:
        warn("nothing will be saved, and the run cannot be resumed: name a folder by --output_dir")
    for line in advice(args, images, steps, from_scratch):
        warn(line)


@record  # so that torchrun shows what ended a process
def run() -> None:
    """The command line: a mistake of the user ends in one line, a request to stop in an exit code of its own."""
    stop_request.install(EXIT_CODE)
    replace_unprintable_characters()
    ignore_image_warnings()
    args = command_line(Flags())
    try:
        status = run_main(args)
    except Stopped as stopped:
        status = stopped.code
        log(f"ended on request (exit code {status}); {how_to_resume(args)}", "yellow")
    ignore_signals()  # nothing is left to stop, and the exit code is to be that of the run
    if status:
        end_now(status)
    kill_workers()  # at exit, the data loader would wait for each of them first
    leave_process_group()


def run_main(args: argparse.Namespace) -> int:
    """Do what the flags say and return the exit code, after a line that says what the user can mend."""
    try:
        main(args)
    except Exception as error:
        # C++ code may have made `Stopped` an error of another type, and other processes may have stopped earlier.
        if stop_request.raised or is_lost_peer(error):
            stop_request.raise_if_asked()
        if not (line := what_to_do(error)):
            raise
        process = f"process {get_rank()}: " if get_world_size() > 1 else ""
        print(error_line(process + line), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run()
