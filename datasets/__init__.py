"""The data sets that `--dataset_file` and `--coco_path` name, and their batches."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from datasets.coco import CocoDetection
from datasets.samplers import EpochSampler, same_shape_batches
from datasets.transforms import make_coco_transforms, resized_size
from util.distributed import get_rank, get_world_size
from util.errors import InputError
from util.nested_tensor import collate_fn
from util.preemption import ignore_signals


def build_dataset(image_set: str, args: argparse.Namespace) -> CocoDetection:
    """The "train" or "val" split of the COCO data under `args.coco_path`.

    Annotations are `annotations/instances_{split}2017.json`, images in `images/{split}2017/` or `{split}2017/`.

    Raises:
        InputError: where the data set is of another kind, files are missing or annotations are not usable.
    """
    if args.dataset_file != "coco":
        raise InputError(f"--dataset_file {args.dataset_file}: only coco is supported so far")
    if not args.coco_path:
        raise InputError("--coco_path is needed: the folder with annotations/ and images/")
    root = Path(args.coco_path)
    if not root.is_dir():
        raise InputError(f"--coco_path {root}: no such folder")
    folders = [root / "images" / f"{image_set}2017", root / f"{image_set}2017"]
    return CocoDetection(
        next((folder for folder in folders if folder.is_dir()), folders[0]),
        root / "annotations" / f"instances_{image_set}2017.json",
        make_coco_transforms(image_set, getattr(args, "min_size", 800), getattr(args, "max_size", 1333)),
        seed=args.seed,
        remove_difficult=args.remove_difficult,
        on_bad_image=getattr(args, "on_bad_image", "error"),
    )


def get_coco_api_from_dataset(dataset: Dataset) -> COCO:
    """The ground truth of a data set (or of a Subset of one) as the evaluator takes it."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.coco


def build_loader(dataset: CocoDetection, args: argparse.Namespace, train: bool) -> DataLoader:
    """This process's batches: in training shuffled by (seed, epoch), without a partial last one.

    In evaluation, the images of a batch have one shape, so that nothing is padded; every image is in a batch of one of
    the processes, and some batches are repeated where the processes would not have equally many.

    `len` counts all batches of an epoch, also where the sampler begins within it.

    Raises InputError where the data does not fill a batch in training.
    """
    if train:
        sampler = EpochSampler(dataset, get_world_size(), get_rank(), seed=args.seed)
        sampler.set_epoch(0)
        batches = {"sampler": sampler, "batch_size": args.batch_size, "drop_last": True}
    else:
        sizes = dataset.records.sizes.tolist()
        shapes = [resized_size(*size, args.min_size, args.max_size) if all(size) else None for size in sizes]
        of_all = same_shape_batches(shapes, args.batch_size)
        mine = DistributedSampler(of_all, get_world_size(), get_rank(), shuffle=False)
        batches = {"batch_sampler": [of_all[i] for i in mine]}
    loader = DataLoader(
        dataset,
        **batches,
        collate_fn=collate_fn,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        # Forked workers share the annotations with this process, and end when it is killed.
        multiprocessing_context="fork" if args.num_workers and sys.platform == "linux" else None,
        worker_init_fn=start_worker,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator(),  # of its own, so that loading draws nothing from the model's random numbers
    )
    if len(loader) == 0:
        raise InputError(
            f"{dataset.annotation_file}: {len(dataset)} images are fewer than a batch of {args.batch_size} "
            f"on each of {get_world_size()} processes; lower --batch_size"
        )
    return loader


def start_worker(_worker: int) -> None:
    """Prepares a process that loads data; torch gives it a single thread."""
    ignore_signals()
    gc.freeze()  # or the collector would write to all that is shared with the main process, and so copy it
