"""Training run: its epochs, checkpoints, evaluations and log."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets.build import CocoLoader
from datasets.coco_eval import CocoEvaluator
from engine import PRINT_FREQ, take_steps
from flags.resolve import Flags, stored
from models.criterion import SetCriterion
from models.detector import Detector
from models.segmentation import DETRsegm
from run.advice import lr_factor
from run.average import MovingAverage
from run.log_file import Score, append_log, logged_scores, score_of, trim_log
from run.optim import build_optimizer, build_schedule, restore_optimizer
from run.progress import Progress
from run.start import Start
from run.step import Step
from run.step_guard import StepGuard
from run.summary import summary
from run.tensorboard import TensorBoard
from util.distributed import all_gather_plain, broadcast_state, get_rank, get_world_size
from util.errors import InputError
from util.files import save_on_master
from util.logger import log
from util.preemption import Stopped, StopRequest
from util.rng import seed_everything
from util.text import counted

KEPT = {"conditional_detr": 10, "detr": 100}  # epochs between numbered checkpoints, as published


class TrainingRun:
    """Training run: trains and evaluates epochs, and writes checkpoints and the log.

    Args:
        start: the start of the run: flags, checkpoint and first epoch.
        loader: the batches of the training data.
        num_classes: the size of the class head.
        model, parallel_model: the model, and the same model wrapped for several processes.
        criterion: the losses.
        device: the device of the model.
        evaluate_val: evaluates a model on val; returns the statistics for the log, and the evaluator of AP.
        output_dir: the folder for checkpoints and the log; None: they are not written.
        stop_request: true once this process is asked to stop.
        board: the writer of curves for TensorBoard.
    """

    def __init__(
        self,
        start: Start,
        loader: CocoLoader,
        num_classes: int,
        model: Detector | DETRsegm,
        parallel_model: nn.Module,
        criterion: SetCriterion,
        device: torch.device,
        evaluate_val: Callable[[nn.Module], tuple[dict[str, Any], CocoEvaluator | None]],
        output_dir: Path | None,
        stop_request: StopRequest,
        board: TensorBoard,
    ) -> None:
        self.start = start
        self.flags = flags = start.flags
        self.loader = loader
        self.model = model
        self.parallel_model = parallel_model
        self.device = device
        self.evaluate_val = evaluate_val
        self.output_dir = output_dir
        self.stop_request = stop_request
        self.board = board
        self.stored_flags = stored(flags) | {"num_classes": num_classes}
        self.images_per_step = flags.batch_size * flags.accum_steps  # of this process
        self.steps_per_epoch = len(self.loader) // flags.accum_steps
        factor = lr_factor(flags, images_per_step(flags))
        optimizer = build_optimizer(model, flags.lr * factor, flags.lr_backbone * factor, flags.weight_decay)
        self.lr_scheduler = build_schedule(optimizer, flags, start.epoch)
        guard = StepGuard(model, flags.skip_nonfinite, output_dir, {"args": self.stored_flags})
        average = MovingAverage(model, flags.ema_decay) if flags.ema_decay else None
        self.step = Step(
            parallel_model,
            criterion,
            optimizer,
            flags.clip_max_norm,
            flags.amp,
            flags.accum_steps,
            guard,
            stop_request,
            average,
        )
        self.scores: list[Score] = []  # of the evaluations so far
        self.progress = Progress()
        # Again, since the start of the run draws more or fewer random numbers, depending on the source of the weights.
        seed_everything(flags.seed + get_rank())

    def train(self) -> None:
        """Train all remaining epochs, and log the commands that use the model."""
        begin = time.time()
        start = self.start
        if start.resumed is not None:
            self.restore(start.resumed)
        if self.output_dir:
            trim_log(self.output_dir / "log.txt", start.epoch)
            scores = all_gather_plain(logged_scores(self.output_dir / "log.txt"))[0]
            self.scores = [Score(*score) for score in scores]
        unlogged = start.unlogged is not None
        self.board.begin(start.epoch - unlogged, self.steps_done(start.epoch))
        if start.unlogged is not None:
            self.finish_epoch(start.epoch - 1, start.unlogged)
        for epoch in range(start.epoch, self.flags.epochs):
            if self.out_of_patience():
                break
            self.train_epoch(epoch)
        log(f"training took {timedelta(seconds=int(time.time() - begin))}", "green")
        if self.output_dir:
            log("\n".join(summary(self.flags, self.output_dir)))

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint of this run, or from a published one."""
        source = self.start.source
        restore_optimizer(self.step.optimizer, checkpoint["optimizer"], source)
        self.progress.restore(checkpoint, self.images_per_step, source)
        self.step.restore(checkpoint, source)
        folder = Path(source).parent
        own = self.output_dir is not None and folder.resolve() == self.output_dir.resolve()
        if own and (numbered := self.numbered(checkpoint, folder)) and not numbered.exists():
            save_on_master(checkpoint, numbered)  # the run was interrupted before this was written

    def train_epoch(self, epoch: int) -> None:
        """Train an epoch, or the rest of an interrupted epoch; write its checkpoint, evaluate, and log it."""
        begin, is_whole = time.time(), self.progress.step == 0
        self.loader.set_epoch(epoch, start=self.progress.step * self.images_per_step)
        stats = take_steps(
            self.step,
            self.loader,
            self.device,
            epoch,
            self.progress,
            partial(self.after_step, epoch),
            later_steps=(self.flags.epochs - epoch - 1) * self.steps_per_epoch,
        )
        if self.step.guard.skipped and not self.progress.logger.meters["loss"].count:
            raise InputError(f"all steps of epoch {epoch} were skipped, because none was finite: lower --lr")
        entry = {f"train_{name}": value for name, value in stats.items()}
        self.lr_scheduler.step()
        self.progress.start_epoch()
        self.save(epoch, train_stats=entry)
        self.end_if_asked()
        self.finish_epoch(epoch, entry)
        if is_whole and (left := self.flags.epochs - epoch - 1):
            seconds = time.time() - begin
            spent, remaining = (timedelta(seconds=int(value)) for value in (seconds, seconds * left))
            log(f"epoch {epoch} took {spent} with evaluation; epochs left: {left}, about {remaining}")

    def steps_done(self, epoch: int) -> int:
        """Return the number of steps of the run so far, including those of the current epoch."""
        return epoch * self.steps_per_epoch + self.progress.step

    def after_step(self, epoch: int) -> None:
        """Write a checkpoint every `--save_every` steps and before a requested stop, and curves per printed line."""
        if (self.progress.step - 1) % PRINT_FREQ == 0:
            self.board.write_step(self.steps_done(epoch), self.progress.logger)
        every = self.flags.save_every
        within = self.progress.step < self.steps_per_epoch
        if self.step.stopping or (every and within and self.progress.step % every == 0):
            self.step.settle()
            self.save(epoch - 1)
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """End the run on all processes if one of them was asked to stop; call this after writing a checkpoint."""
        if self.step.stopping:
            # This also waits for the process that writes, since the end of one process may end the others.
            raise Stopped(max(all_gather_plain(self.stop_request.exit_code)))

    def save(self, epoch: int, **more: Any) -> None:
        """Write a checkpoint with everything needed to resume; `epoch` is the last finished epoch."""
        if not self.output_dir:
            return
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": epoch,
            "args": self.stored_flags,
            **self.loader.dataset.classes.state_dict(),
            **self.progress.state_dict(),
            **self.step.state_dict(),
            **more,
        }
        latest, previous = (self.output_dir / f"checkpoint{name}.pth" for name in ("", "_previous"))
        save_on_master(checkpoint, latest, keep_old_as=previous)
        if numbered := self.numbered(checkpoint, self.output_dir):
            save_on_master(checkpoint, numbered)

    def numbered(self, checkpoint: dict[str, Any], folder: Path) -> Path | None:
        """Return the path of a numbered checkpoint, if one is due: before a learning rate drop, or as `KEPT` says."""
        epochs = checkpoint["epoch"] + 1
        before_drop = self.flags.lr_schedule == "step" and epochs % self.flags.lr_drop == 0
        stays = before_drop or epochs % KEPT[self.flags.model] == 0
        if checkpoint.get("step") or not stays:
            return None
        return folder / f"checkpoint{checkpoint['epoch']:04}.pth"

    def finish_epoch(self, epoch: int, entry: dict[str, Any]) -> None:
        """Evaluate if this is due, and log the epoch; `entry` has the statistics of its training."""
        evaluator = None
        if (epoch + 1) % self.flags.eval_every == 0 or epoch + 1 == self.flags.epochs:
            with self.stop_request.at_once():
                stats, evaluator = self.evaluate()
            entry = entry | {f"test_{name}": value for name, value in stats.items()}
            self.save_if_best(score_of(entry | {"epoch": epoch}))
        self.board.write_epoch(epoch + 1, entry, evaluator)
        if self.output_dir:
            trained = count_parameters(self.model)[1]
            append_log(self.output_dir / "log.txt", entry | {"epoch": epoch, "n_parameters": trained})

    def evaluate(self) -> tuple[dict[str, Any], CocoEvaluator | None]:
        """Evaluate the model on val, or the average of its weights with `--ema_decay`; return the results."""
        average = self.step.average
        if average is None:
            return self.evaluate_val(self.parallel_model)
        if get_world_size() > 1:
            broadcast_state(average.model)  # statistics of norms on CPUs differ between the processes
        return self.evaluate_val(average.model)

    def save_if_best(self, score: Score | None) -> None:
        """Write checkpoint_best.pth if no earlier score on val was as high; `score` is None if there is none."""
        if score is None:
            return
        if self.output_dir and all(score.value > earlier.value for earlier in self.scores):
            average = self.step.average
            model = average.model if average else self.model
            best = {"model": model.state_dict(), "epoch": score.epoch, "ap": score.value, "args": self.stored_flags}
            save_on_master(best | self.loader.dataset.classes.state_dict(), self.output_dir / "checkpoint_best.pth")
        self.scores.append(score)

    def out_of_patience(self) -> bool:
        """Return whether the last `--patience` evaluations were not better than an earlier one; if so, log it."""
        patience, scores = self.flags.patience, self.scores
        if not patience or not scores:
            return False
        best = max(scores, key=lambda score: score.value)  # the first of equal ones
        if len(scores) - 1 - scores.index(best) < patience:
            return False
        result = f"{best.metric} than {best.value:.3f}"
        log(
            f"ended early: {counted(patience, 'evaluation')} without a better {result} (--patience {patience})", "green"
        )
        return True


def images_per_step(flags: Flags) -> int:
    """Return the number of images per step on all processes together."""
    return flags.batch_size * flags.accum_steps * get_world_size()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and the number of trained parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
