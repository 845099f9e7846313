"""The data of a run, and the classes that its model distinguishes."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints.checkpoint import classes_of
from datasets import build_dataset, build_loader
from datasets.build import CocoLoader, build_instances
from datasets.classes import Classes
from datasets.coco import CocoDetection
from flags.resolve import NUM_CLASSES, Flags
from run.start import Start
from util.distributed import get_world_size
from util.errors import InputError
from util.logger import warn
from util.text import counted


@dataclass(frozen=True)
class Data:
    """Batches for training and evaluation.

    Attributes:
        train: the batches for training; None if the run only evaluates.
        val: the batches for evaluation.
        instances: the boxes and masks with which AP is measured; None for panoptic data without an instance file.
        classes: the classes of the model, from the checkpoint; without a checkpoint, from the first data set.
        num_classes: the size of the class head.
    """

    train: CocoLoader | None
    val: CocoLoader
    instances: CocoDetection | None
    classes: Classes
    num_classes: int

    @property
    def datasets(self) -> list[CocoDetection]:
        """Data sets of the run: for training, if it trains, and for evaluation."""
        return [loader.dataset for loader in (self.train, self.val) if loader is not None]

    @property
    def all_classes(self) -> Classes:
        """Return the classes of the model and of the evaluation data; each may have classes that the other lacks."""
        return self.classes | self.val.dataset.classes


def load_data(start: Start) -> Data:
    """Read the annotations that the flags name.

    Raises:
        InputError: if files are missing or not usable, or nothing would be learned from the data.
    """
    flags = start.flags
    checkpoint, source = start.given_model
    known = classes_of(checkpoint, source) if checkpoint else None
    train = None if flags.eval else build_dataset("train", flags, known, share=True)
    val = build_dataset(flags.image_set, flags, known or (train and train.classes), share=True)
    classes = known or (train or val).classes
    default = NUM_CLASSES["coco_panoptic"] if flags.dataset_file == "coco_panoptic" else 0
    num_classes = start.num_classes(needed=max(classes.num_labels, default))
    for dataset in filter(None, (train, val)):
        dataset.check_classes(num_classes)
    loader_train = build_loader(train, flags, train=True) if train else None
    instances = build_instances(val, flags)
    data = Data(loader_train, build_loader(val, flags, train=False), instances, classes, num_classes)
    if data.train is not None:
        check_trains(flags, data.train)
    return data


def check_trains(flags: Flags, loader: CocoLoader) -> None:
    """Raise InputError if nothing would be learned from the data; warn if --overfit has fewer images than a batch."""
    dataset = loader.dataset
    dataset.check_trains()
    if flags.accum_steps > len(loader):
        batches = counted(len(loader), "batch")
        raise InputError(f"--accum_steps {flags.accum_steps}: an epoch has only {batches}; lower it")
    if (images := len(set(dataset.ids))) < flags.batch_size * get_world_size():
        batch = counted(flags.batch_size, "image")
        usable = counted(images, "image has", "images have")
        warn(f"--overfit {flags.overfit}: only {usable} boxes, so that a batch of {batch} repeats some")
