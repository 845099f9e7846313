"""Train and evaluate detectors: the main steps of a run.

Usage:
    python main.py --coco_path /path/to/coco --output_dir output/run
    python main.py --coco_path /path/to/coco --eval --resume checkpoint.pth
"""

from __future__ import annotations

from flags.parser import ParsedFlags, check_args, check_command_line, command_line, get_args_parser
from util.command import answer_early
from util.orphans import end_with_launcher
from util.preemption import EXIT_CODE, Stopped, end_now, ignore_signals, kill_workers, stop_request

if __name__ == "__main__":  # the imports below take seconds
    stop_request.install(EXIT_CODE, importing=True)
    end_with_launcher()
    answer_early(check_command_line)

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from datasets.build import CocoLoader
from datasets.coco_eval import CocoEvaluator
from datasets.odd_boxes import crowded_images
from datasets.panoptic import PanopticDetection
from engine import detect, evaluate
from evaluation.evaluators import coco_evaluator
from evaluation.mistakes import draw_examples
from evaluation.panoptic_quality import PanopticEvaluator
from evaluation.panoptic_report import write_panoptic_report
from evaluation.report import write_report, write_test_results
from flags.limits import check_device
from flags.resolve import Flags, resolve
from models import build_model
from run.advice import advice, lr_factor
from run.data import Data, load_data
from run.kernels import compile_model, keep_freed_memory, use_deterministic_kernels, use_fast_kernels
from run.output_folder import claim_output_dir
from run.start import Start, find_start, how_to_resume
from run.tensorboard import TensorBoard
from training import TrainingRun, count_parameters, images_per_step
from util.command import error_line, ignore_image_warnings, need, replace_unprintable_characters
from util.distributed import (
    distribute,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave_process_group,
)
from util.errors import is_lost_peer, what_to_do
from util.logger import log, warn
from util.rng import seed_everything
from util.text import counted

__all__ = ["get_args_parser", "main", "run"]


def main(args: argparse.Namespace) -> None:
    """Train, or with `args.eval` only evaluate.

    With `args.resume`, the flags of the model come from the checkpoint. Flags that the user has set must agree with it:
    those on the command line or, in a namespace from Python code, those that differ from their default.

    Raises:
        InputError: if flags, files or annotations are not usable; if possible, before any long work.
        Stopped: if a signal asked the run to stop.
    """
    flags = resolve(args)
    device = set_up(flags)
    with claim_output_dir(flags) as output_dir:
        start = find_start(flags, output_dir)
        if start.finished:
            epochs = counted(flags.epochs, "epoch")
            log(f"finished: {start.source} has the {epochs} asked for; raise --epochs to continue", "green")
        else:
            train_or_evaluate(start, device, output_dir)


def set_up(flags: Flags) -> torch.device:
    """Check the flags, connect to the other processes, set the seed, choose kernels, and return the device."""
    check_args(flags)
    check_device(flags.device)
    if flags.tensorboard:
        need("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    init_distributed_mode(argparse.Namespace(**vars(flags)))
    device = torch.device(flags.device)
    seed_everything(flags.seed + get_rank())
    use_fast_kernels(device)
    keep_freed_memory(device)
    if flags.deterministic:
        use_deterministic_kernels()
    return device


def train_or_evaluate(start: Start, device: torch.device, output_dir: Path | None) -> None:
    """Train or evaluate as described in `main`, in an output folder that no other run uses."""
    flags = start.flags
    data = load_data(start)
    model, criterion, postprocessors = build_model(flags, data.num_classes, data.all_classes.isthing)
    start.fill(model, data.classes)
    print_summary(flags, data, model)
    model.to(device)
    if flags.compile:
        compile_model(model)
    parallel_model = distribute(model, device, flags.backbone_norm == "batch", trains=not flags.eval)

    dataset_val = data.val.dataset
    if flags.eval and flags.image_set == "test":
        found = coco_evaluator(postprocessors, dataset_val.ground_truth())
        detect(parallel_model, postprocessors, data.val, [found], device, flags.amp)
        assert output_dir is not None  # as `check_args` makes sure
        write_test_results(found, data.all_classes, output_dir)
        return
    arrays_dir = "" if flags.eval else flags.output_dir  # eval/ belongs to training, which may use the folder, too

    instances = data.instances
    panoptic = None
    if "panoptic" in postprocessors:
        assert isinstance(dataset_val, PanopticDetection)
        panoptic = PanopticEvaluator(dataset_val, output_dir and output_dir / "panoptic_eval", data.all_classes)

    def evaluate_val(model: nn.Module) -> tuple[dict[str, Any], CocoEvaluator | None]:
        base_ds = instances and instances.ground_truth()
        return evaluate(model, criterion, postprocessors, data.val, base_ds, device, arrays_dir, flags.amp, panoptic)

    if data.train is None:
        _, evaluator = evaluate_val(parallel_model)
        if output_dir and evaluator and instances:
            write_report(evaluator, instances, data.all_classes, output_dir)
        if output_dir and panoptic:
            write_panoptic_report(panoptic, output_dir)
        return

    print_training(start, data.train)
    board_dir = output_dir / "tensorboard" if output_dir and flags.tensorboard and is_main_process() else None
    board = TensorBoard(board_dir, partial(draw_examples, instances or dataset_val, data.all_classes))
    with stop_request.deferred(), board:
        TrainingRun(
            *(start, data.train, data.num_classes, model, parallel_model, criterion, device),
            *(evaluate_val, output_dir, stop_request, board),
        ).train()


def print_summary(flags: Flags, data: Data, model: nn.Module) -> None:
    """Log the data sets and the model, and warn about data that limit the results."""
    names = (flags.image_set,) if flags.eval else ("train", flags.image_set)
    for name, dataset in zip(names, data.datasets, strict=True):
        log(f"{name + ':':<7}{dataset.summary()}")
        for line in crowded_images(dataset.objects_per_image(), flags.num_queries, flags.max_detections):
            warn(f"{name}: {line}")
    val = data.val.dataset
    if flags.image_set == "val" and not val.summary().boxes:
        warn(f"{val.annotation_file} has no boxes: AP cannot be measured, and no best checkpoint is kept")
    total, trained = count_parameters(model)
    log(
        f"model: {flags.model} with {flags.backbone}{' dilated' if flags.dilation else ''}, {total:,} parameters, "
        f"{0 if flags.eval else trained:,} of them trained; {counted(flags.num_queries, 'query')}, "
        f"class ids 0 to {data.num_classes - 1}"
    )


def print_training(start: Start, loader: CocoLoader) -> None:
    """Log the size of the training, and warn about settings with which it learns little."""
    flags = start.flags
    accumulated = f" × {flags.accum_steps} batches" if flags.accum_steps > 1 else ""
    images = images_per_step(flags)
    steps = len(loader) // flags.accum_steps * flags.epochs
    log(
        f"training: {counted(flags.batch_size, 'image')} × {counted(get_world_size(), 'process')}{accumulated} = "
        f"{images} per step; {counted(flags.epochs, 'epoch')}, {counted(steps, 'step')}; "
        f"learning rate {flags.lr * lr_factor(flags, images):.3g}"
    )
    if flags.overfit:
        log(f"overfitting: {counted(flags.overfit, 'image')}, each many times per epoch, without augmentation")
    if not flags.output_dir:
        warn("nothing will be saved, and the run cannot be resumed: name a folder with --output_dir")
    for line in advice(flags, images, steps, from_scratch=not (start.checkpoint or start.other_model)):
        warn(line)


@record  # so that torchrun shows the error that ended a process
def run() -> None:
    """Run the command line: report a user's mistake in one line, and a requested stop by a special exit code."""
    stop_request.install(EXIT_CODE)
    replace_unprintable_characters()
    ignore_image_warnings()
    args = command_line(ParsedFlags())
    try:
        status = run_main(args)
    except Stopped as stopped:
        status = stopped.code
        log(f"ended on request (exit code {status}); {how_to_resume(args)}", "yellow")
    ignore_signals()  # nothing is left to stop, and the exit code must be that of the run
    if status:
        end_now(status)
    kill_workers()  # otherwise, the data loader waits for each of them at exit
    leave_process_group()


def run_main(args: argparse.Namespace) -> int:
    """Run `main` and return the exit code; print a line about errors that the user can fix."""
    try:
        main(args)
    except Exception as error:
        # C++ code may have turned `Stopped` into another type of error, and other processes may have stopped earlier.
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
