"""Data sets that `--dataset_file` and `--coco_path` select, and their batches."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Subset

from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.layouts import find_images, find_panoptic, find_split
from datasets.panoptic import PanopticDetection
from datasets.samplers import EpochSampler, same_shape_batches
from datasets.transforms import make_coco_transforms, resized_size
from flags.resolve import NUM_CLASSES, Flags, resolve
from util.command import ignore_image_warnings
from util.distributed import get_rank, get_world_size
from util.errors import InputError
from util.logger import log
from util.nested_tensor import collate_fn
from util.orphans import end_with
from util.preemption import ignore_signals, kill_workers_at_exit
from util.text import counted

OVERFIT_STEPS = 50  # per epoch of --overfit, which repeats its few images


def build_dataset(
    image_set: str, args: argparse.Namespace, classes: Classes | None = None, share: bool = False
) -> CocoDetection:
    """Return the "train", "val" or "test" split; with `args.overfit`, "train" and "val" are a few training images.

    Under `args.coco_path`, annotations are `annotations/instances_{split}2017.json`, images in `images/{split}2017/` or
    `{split}2017/`, or both are where common exporters write them (`datasets.layouts`). `args.{split}_annotations` and
    `args.{split}_images` name other paths. "test" is COCO's test-dev, listed without annotations in
    `annotations/image_info_test-dev2017.json`.

    With `args.dataset_file` "coco_panoptic", annotations are `annotations/panoptic_{split}2017.json` under
    `args.coco_panoptic_path`, and the data set is a `PanopticDetection`.

    Args:
        image_set: the split.
        args: the flags.
        classes: the classes of the model or the training data, whose labels are used.
        share: all processes call this together, and the first one reads the annotations for all.

    Raises:
        InputError: if the kind of data set is unknown, files are missing or annotations are not usable.
    """
    flags = resolve(args)
    if flags.dataset_file not in NUM_CLASSES:
        raise InputError(f"--dataset_file {flags.dataset_file}: choose one of {', '.join(NUM_CLASSES)}")
    overfit = flags.overfit
    split = "train" if overfit else image_set
    settings = {
        "transforms": make_coco_transforms("val" if overfit else image_set, flags.min_size, flags.max_size),
        "seed": flags.seed,
        "on_bad_image": flags.on_bad_image,
        "classes": classes,
        "max_megapixels": flags.max_megapixels,
        "share": share,
        "masks": flags.masks and split != "test",
    }
    dataset: CocoDetection
    if flags.dataset_file == "coco_panoptic":
        dataset = PanopticDetection(*panoptic_split(flags, split), **settings)
    else:
        annotations, images = instance_split(flags, split)
        labelled, difficult = split != "test", flags.remove_difficult
        dataset = CocoDetection(images, annotations, labelled=labelled, remove_difficult=difficult, **settings)
    if overfit:
        images_per_step = flags.batch_size * flags.accum_steps * get_world_size()
        dataset.keep_first(overfit, at_least=OVERFIT_STEPS * images_per_step if image_set == "train" else 0)
    return dataset


def instance_split(flags: Flags, split: str) -> tuple[str | Path, str | Path]:
    """Return the annotation file and the image folder of a split: named by flags, or found under `--coco_path`."""
    images, annotations = getattr(flags, f"{split}_images", None), getattr(flags, f"{split}_annotations", None)
    if images and annotations:
        return annotations, images
    other = getattr(flags, f"{'val' if split == 'train' else 'train'}_annotations", None)
    alone = bool(flags.overfit or flags.eval or other)
    return find_split(coco_folder(flags.coco_path, split), split, annotations, images, alone)


def panoptic_split(flags: Flags, split: str) -> tuple[Path, Path, Path]:
    """Return the image folder, the annotation file and the folder of PNG files of a split of panoptic data.

    Raises:
        InputError: for "test", which has no panoptic annotations, or if one of the three is not found.
    """
    if split == "test":
        raise InputError(
            "--image_set test: test images have no panoptic annotations; drop --dataset_file coco_panoptic"
        )
    images, annotations = getattr(flags, f"{split}_images"), getattr(flags, f"{split}_annotations")
    if not annotations and not flags.coco_panoptic_path:
        raise InputError(
            f"--dataset_file coco_panoptic: no {split} data: name the folder with annotations/ and the PNG files with "
            f"--coco_panoptic_path, or the file with --{split}_annotations"
        )
    annotations, segments = find_panoptic(Path(flags.coco_panoptic_path or "."), split, annotations)
    if not images:
        images = find_images(Path(flags.coco_path or flags.coco_panoptic_path or "."), split, annotations)
    return Path(images), annotations, segments


def build_instances(dataset: CocoDetection, flags: Flags) -> CocoDetection | None:
    """Return the data set on which AP of boxes and masks is measured: `dataset`, or for panoptic data its instances.

    Instances come from the instance file of the same split under `--coco_path`; without this file, return None.
    """
    if not isinstance(dataset, PanopticDetection):
        return dataset
    name = f"annotations/instances_{'train' if flags.overfit else 'val'}2017.json"
    path = Path(flags.coco_path or "", name)
    if not flags.coco_path or not path.is_file():
        log(f"AP of boxes and masks is not measured: --coco_path {flags.coco_path or '(not given)'} has no {name}")
        return None
    plain = resolve(
        flags, dataset_file="coco", overfit=0, val_annotations=str(path), val_images=str(dataset.image_folder)
    )
    instances = build_dataset("val", plain, dataset.classes, share=True)
    missing = sorted(set(dataset.ids) - set(instances.ids))
    if missing:
        log(f"AP of boxes and masks is not measured: {path} does not list image id {missing[0]}")
        return None
    return instances


def coco_folder(path: str | None, image_set: str) -> Path:
    """Return the folder of `--coco_path`, which must exist."""
    if not path:
        others = f", or both --{image_set}_images and --{image_set}_annotations" if image_set != "test" else ""
        raise InputError(f"no {image_set} data: name the folder with annotations/ and images/ with --coco_path{others}")
    if not Path(path).is_dir():
        raise InputError(f"--coco_path {path}: no such folder")
    return Path(path)


def get_coco_api_from_dataset(dataset: Dataset) -> COCO:
    """Read the ground truth of a data set (or of a Subset of one) from its file again, for the evaluator.

    Its category ids are labels, which models predict. If the file has other ids (texts, numbers above 1,999, or another
    numbering than the model's), `dataset.classes.ids` maps labels to them.
    """
    base: Any = dataset
    while isinstance(base, Subset):
        base = base.dataset
    return base.coco


class CocoLoader(DataLoader):
    """Batches of a data set in COCO format."""

    dataset: CocoDetection

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the order and augmentation of an epoch, and skip the first `start` samples of this process."""
        self.dataset.set_epoch(epoch)
        if isinstance(self.sampler, EpochSampler):  # evaluation has a fixed order
            self.sampler.set_epoch(epoch, start)


def build_loader(dataset: CocoDetection, flags: Flags, train: bool) -> CocoLoader:
    """Return this process's batches: in training, shuffled by (seed, epoch) and without a partial last one.

    In evaluation, all images of a batch have one shape, so that nothing is padded. Every image is in a batch of one
    process, and some batches are repeated so that all processes have the same number.

    `len` counts all batches of an epoch, even if the sampler starts in its middle.

    Raise InputError if the training data does not fill a batch.
    """
    if train:
        sampler = EpochSampler(dataset, get_world_size(), get_rank(), seed=flags.seed)
        sampler.set_epoch(0)
        batches: dict[str, Any] = {"sampler": sampler, "batch_size": flags.batch_size, "drop_last": True}
    else:
        sizes = dataset.records.sizes.tolist()
        shapes = [resized_size(w, h, flags.min_size, flags.max_size) if w and h else None for w, h in sizes]
        of_all = same_shape_batches(shapes, flags.batch_size)
        repeated = -(-len(of_all) // get_world_size()) * get_world_size()  # the same number for each process
        mine = range(get_rank(), repeated, get_world_size())
        batches = {"batch_sampler": [of_all[i % len(of_all)] for i in mine]}
    if flags.num_workers:
        kill_workers_at_exit()
    loader = CocoLoader(
        dataset,
        **batches,
        collate_fn=collate_fn,
        num_workers=flags.num_workers,
        persistent_workers=flags.num_workers > 0,
        # Forked workers share the annotations with this process, and end when it is killed.
        multiprocessing_context="fork" if flags.num_workers and sys.platform == "linux" else None,
        worker_init_fn=partial(start_worker, os.getpid()),
        pin_memory=torch.device(flags.device).type == "cuda",
        generator=torch.Generator(),  # a separate one: loading does not change the model's random numbers
    )
    if len(loader) == 0:
        raise InputError(
            f"{dataset.annotation_file}: {counted(len(dataset), 'image is', 'images are')} fewer than a batch of "
            f"{flags.batch_size} per process, with {counted(get_world_size(), 'process')}; lower --batch_size"
        )
    return loader


def start_worker(parent: int, _worker: int) -> None:
    """Prepare a data-loading process of the process `parent`; torch gives it a single thread."""
    end_with(parent, "")
    ignore_signals()
    ignore_image_warnings()
    gc.freeze()  # otherwise, the collector writes to memory shared with the main process, which copies it
