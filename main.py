"""Trains and evaluates Conditional DETR: the story of a run.

Usage:
    python main.py --coco_path /path/to/coco --output_dir output/run
    python main.py --coco_path /path/to/coco --eval --resume checkpoint.pth
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from datasets import build_dataset, build_loader, get_coco_api_from_dataset
from datasets.coco import CocoDetection
from datasets.coco_eval import CocoEvaluator
from datasets.mistakes import draw_examples
from datasets.report import write_report, write_test_results
from engine import PRINT_FREQ, detect, evaluate, train_one_epoch
from models import build_model
from models.backbone import load_backbone_weights
from util.advice import advice, lr_factor
from util.args import check_args, get_args_parser
from util.checkpoint import classes_of, load_checkpoint, load_model_weights, save_on_master
from util.command import error_line
from util.distributed import (
    barrier,
    distribute,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave_process_group,
)
from util.errors import InputError, what_to_do
from util.finetune import start_from
from util.kernels import use_deterministic_kernels, use_fast_kernels
from util.log_file import append_log, best_ap, trim_log
from util.logger import log, warn
from util.optim import build_optimizer, build_schedule, restore_optimizer
from util.preemption import EXIT_CODE, SIGNALS, Preempted, StopRequest, end_at_once, kill_workers, noticing_signals
from util.progress import Progress
from util.resume import choose_num_classes, first_epoch, holds_training, read_checkpoint, unlogged_epoch
from util.rng import seed_everything
from util.step_guard import StepGuard
from util.tensorboard import TensorBoard


def main(args: argparse.Namespace) -> None:
    """Trains, or with `args.eval` only evaluates, as the flags say.

    Raises:
        InputError: for flags, files and annotations that are not usable; before any long work where that can be known.
        Preempted: where a signal asked the run to end.
    """
    check_args(args)
    init_distributed_mode(args)
    device = torch.device(args.device)
    seed_everything(args.seed + get_rank())
    if device.type == "cuda":
        use_fast_kernels()
    if args.deterministic:
        use_deterministic_kernels()
    output_dir = make_output_dir(args.output_dir)

    checkpoint, source = read_checkpoint(args)
    unlogged = unlogged_epoch(checkpoint, source, output_dir)
    if checkpoint and not args.eval:
        args.start_epoch = first_epoch(checkpoint, source, args)
        if args.start_epoch >= args.epochs and not unlogged:
            log(f"finished: {source} has all {args.epochs} epochs; raise --epochs to train on", "green")
            return

    start = load_checkpoint(args.finetune) if args.finetune and not checkpoint else None
    classes = checkpoint and classes_of(checkpoint, source)
    dataset_train = None if args.eval else build_dataset("train", args, classes)
    classes = classes or (dataset_train and dataset_train.classes)
    dataset_val = build_dataset(args.image_set, args, classes)
    classes = classes or dataset_val.classes
    args.num_classes = choose_num_classes(args, checkpoint, source, classes.num_labels)
    for dataset in filter(None, (dataset_train, dataset_val)):
        dataset.check_classes(args.num_classes)
    all_classes = classes | dataset_val.classes  # the model may know others than this data has, and the other way round
    loader_train = dataset_train and build_loader(dataset_train, args, train=True)
    loader_val = build_loader(dataset_val, args, train=False)

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
        model.compile()
    parallel_model = distribute(model, device, args.distributed, args.backbone_norm == "batch", trains=not args.eval)

    base_ds = get_coco_api_from_dataset(dataset_val)
    evaluate_val = partial(
        evaluate, parallel_model, criterion, postprocessors, loader_val, base_ds, device, args.output_dir, args.amp
    )
    if args.eval and args.image_set == "test":
        found = detect(parallel_model, postprocessors, loader_val, base_ds, device, args.amp)
        write_test_results(found, all_classes, output_dir)
        return
    if args.eval:
        _, evaluator = evaluate_val()
        if output_dir:
            write_report(evaluator, dataset_val, all_classes, output_dir)
        return

    start = time.time()
    board_dir = output_dir / "tensorboard" if args.tensorboard and is_main_process() else None
    board = TensorBoard(board_dir, partial(draw_examples, dataset_val, all_classes))
    with noticing_signals() as stop_request, board:
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
    log(f"training took {timedelta(seconds=int(time.time() - start))}", "green")


class TrainingRun:
    """The epochs of a run, its checkpoints and its log.

    Args:
        args: the flags.
        model, parallel_model: the model, and the same as it trains on several processes.
        loader: the training batches.
        evaluate_val: evaluates the model; returns the statistics for the log first.
        output_dir: where checkpoints and the log go; None: nowhere.
        stop_request: true once this process is asked to end.
        board: where the curves are drawn.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        parallel_model: nn.Module,
        criterion: nn.Module,
        loader: DataLoader,
        evaluate_val: Callable[[], tuple[dict[str, Any], CocoEvaluator]],
        output_dir: Path | None,
        stop_request: StopRequest,
        board: TensorBoard,
    ) -> None:
        self.args = args
        self.model = model
        self.parallel_model = parallel_model
        self.criterion = criterion
        self.loader = loader
        self.evaluate_val = evaluate_val
        self.output_dir = output_dir
        self.stop_request = stop_request
        self.board = board
        self.device = torch.device(args.device)
        self.images_a_step = args.batch_size * args.accum_steps  # of this process
        factor = lr_factor(args, images_a_step(args))
        self.optimizer = build_optimizer(model, args.lr * factor, args.lr_backbone * factor, args.weight_decay)
        self.lr_scheduler = build_schedule(self.optimizer, args.lr_drop, args.start_epoch)
        self.progress = Progress(torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16"))
        self.guard = StepGuard(model, args.skip_nonfinite, output_dir, {"args": vars(args)}, stop_request)
        seed_everything(args.seed + get_rank())  # what was drawn before depends on where the weights come from

    def restore(self, checkpoint: dict[str, Any], source: str) -> None:
        """Goes on where a checkpoint of this run, or a published one, was written."""
        restore_optimizer(self.optimizer, checkpoint["optimizer"], source)
        self.progress.restore(checkpoint, self.images_a_step)

    def train_epoch(self, epoch: int) -> None:
        """Trains an epoch, or what is left of it, writes its checkpoint, evaluates, and logs."""
        self.loader.dataset.set_epoch(epoch)
        self.loader.sampler.set_epoch(epoch, start=self.progress.step * self.images_a_step)
        stats = train_one_epoch(
            self.parallel_model,
            self.criterion,
            self.loader,
            self.optimizer,
            self.device,
            epoch,
            self.args.clip_max_norm,
            self.args.amp,
            self.args.accum_steps,
            self.progress,
            self.guard,
            partial(self.after_step, epoch),
        )
        entry = {f"train_{name}": value for name, value in stats.items()}
        self.lr_scheduler.step()
        self.progress.start_epoch()
        self.save(epoch, train_stats=entry)
        self.end_if_asked()
        self.finish_epoch(epoch, entry)

    def steps_done(self, epoch: int) -> int:
        """The steps of the run so far, within an epoch."""
        return epoch * (len(self.loader) // self.args.accum_steps) + self.progress.step

    def after_step(self, epoch: int) -> None:
        """A checkpoint every `--save_every` steps, and where a signal asks for the end; curves as lines are printed."""
        if (self.progress.step - 1) % PRINT_FREQ == 0:
            self.board.write_step(self.steps_done(epoch), self.progress.logger)
        every = self.args.save_every
        within = self.progress.step < len(self.loader) // self.args.accum_steps
        if self.guard.stopping or (every and within and self.progress.step % every == 0):
            self.guard.settle(self.progress)
            self.save(epoch - 1)
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """Ends the run on all processes, behind a checkpoint."""
        if self.guard.stopping:
            barrier()  # the first process to end may take the others with it, and one still writes
            raise Preempted

    def save(self, epoch: int, **more: Any) -> None:
        """Writes what it takes to go on; `epoch` is the last finished one."""
        if not self.output_dir:
            return
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": epoch,
            "args": vars(self.args),
            **self.loader.dataset.classes.state_dict(),
            **self.progress.state_dict(),
            **more,
        }
        latest, previous = (self.output_dir / f"checkpoint{name}.pth" for name in ("", "_previous"))
        save_on_master(checkpoint, latest, keep_old_as=previous)
        # One stays before each drop of the learning rate and every 10 epochs.
        epochs = epoch + 1
        if self.progress.step == 0 and (epochs % self.args.lr_drop == 0 or epochs % 10 == 0):
            save_on_master(checkpoint, self.output_dir / f"checkpoint{epoch:04}.pth")

    def finish_epoch(self, epoch: int, entry: dict[str, Any]) -> None:
        """Evaluates if it is time to, and writes the epoch's line, of which `entry` is the training's part."""
        evaluator = None
        if (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs:
            with self.stop_request.at_once():
                stats, evaluator = self.evaluate_val()
            entry = entry | {f"test_{name}": value for name, value in stats.items()}
            self.save_if_best(epoch, stats["coco_eval_bbox"][0])
        self.board.write_epoch(epoch + 1, entry, evaluator)
        if self.output_dir:
            trained = count_parameters(self.model)[1]
            append_log(self.output_dir / "log.txt", entry | {"epoch": epoch, "n_parameters": trained})

    def save_if_best(self, epoch: int, ap: float) -> None:
        """Keeps the model for inference where no epoch in the log has as high an AP on val."""
        if self.output_dir and is_main_process() and ap > best_ap(self.output_dir / "log.txt"):
            best = {"model": self.model.state_dict(), "epoch": epoch, "ap": ap, "args": vars(self.args)}
            classes = self.loader.dataset.classes.state_dict()
            save_on_master(best | classes, self.output_dir / "checkpoint_best.pth")


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
    for name, dataset in (("train", dataset_train), (args.image_set, dataset_val)):
        if dataset is not None:
            log(f"{name + ':':<7}{dataset.summary()}")
    total, trained = count_parameters(model)
    log(
        f"model: {total:,} parameters, {0 if args.eval else trained:,} of them trained; {args.backbone}"
        f"{' dilated' if args.dilation else ''}, {args.num_queries} queries, class ids 0 to {args.num_classes - 1}"
    )


def print_training(args: argparse.Namespace, loader: DataLoader, from_scratch: bool) -> None:
    """How much is about to be learnt from, and what can be said against it."""
    accumulated = f" × {args.accum_steps} batches" if args.accum_steps > 1 else ""
    images = images_a_step(args)
    steps = len(loader) // args.accum_steps * args.epochs
    log(
        f"training: {args.batch_size} images × {get_world_size()} processes{accumulated} = {images} a step; "
        f"{args.epochs} epochs, {steps:,} steps; learning rate {args.lr * lr_factor(args, images):.3g}"
    )
    if args.overfit:
        log(f"overfitting: {args.overfit} images, each many times an epoch, without augmentation")
    for line in advice(args, images, steps, from_scratch):
        warn(line)


def images_a_step(args: argparse.Namespace) -> int:
    """The images that all processes together learn from in a step."""
    return args.batch_size * args.accum_steps * get_world_size()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trained ones."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


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
    for number in SIGNALS:
        signal.signal(number, end_at_once)
    status: int | str = 0
    try:
        main(parser.parse_args())
    except Preempted:
        log(f"ended on request (exit code {EXIT_CODE}); --resume auto goes on from here", "yellow")
        status = EXIT_CODE
    except KeyboardInterrupt:
        status = "interrupted"
    except (InputError, RuntimeError) as error:
        if not (line := what_to_do(error)):
            raise
        process = f"process {get_rank()}: " if get_world_size() > 1 else ""
        status = error_line(process + line)
    finally:
        kill_workers()  # at exit, the data loader would wait for each of them first
    leave_process_group(orderly=not status)
    sys.exit(status)


if __name__ == "__main__":
    run()
