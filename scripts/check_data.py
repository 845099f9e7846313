"""Check a data set before a training: count its objects, find mistakes, and draw some images with their objects.

    python -m scripts.check_data --coco_path /path/to/coco --output_dir output/check_data

The tool takes main.py's flags, and uses those for data, batches and model sizes. It reads every image, prints a report,
and writes a page of pictures with boxes for each split. The exit code is 1 if some images cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("check_data")

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from datasets import build_dataset
from datasets.coco import CocoDetection
from datasets.images import Picture, summarize_notes
from datasets.odd_boxes import crowded_images
from datasets.panoptic import PanopticDetection
from datasets.transforms import resized_size
from evaluation.panoptic_pictures import draw_segments
from evaluation.pictures import CELL, annotate, contact_sheet
from flags.resolve import Flags, resolve
from util.command import run_command
from util.errors import InputError
from util.files import replacing
from util.logger import log, warn
from util.text import counted

PICTURES, COLUMNS = 12, 4  # per page
FEW_BOXES = 10  # fewer boxes of a class are hardly enough to learn it
BATCHES = 2_000  # random batches that estimate the padding
MOST_LINES = 10  # per list
AREAS = (32**2, 96**2)  # COCO's bounds between small, medium and large objects, in pixels


@dataclass
class Split:
    """Findings in one split.

    Attributes:
        sizes: [M, 2], width and height of the images, 0 for images that cannot be read.
        digests: a hash per image file, None for images that cannot be read.
        unreadable: the problem of each image that cannot be used.
        notes: the name of each image, and notes on how it was read.
    """

    name: str
    dataset: CocoDetection
    sizes: np.ndarray
    digests: list[bytes | None]
    unreadable: list[str]
    notes: list[tuple[str, list[str]]]

    @cached_property
    def targets(self) -> np.ndarray:
        """Mask [N] over all objects: those that training or evaluation uses as targets."""
        return self.dataset.visible_objects()[1]

    def boxes_of(self, label: int) -> tuple[int, int]:
        """Return the number of targets of a class, and the number of images with such targets."""
        of_class = self.targets & (self.dataset.records.objects.labels == label)
        return int(of_class.sum()), len(np.unique(self.dataset.records.image_of_object[of_class]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = resolve(parse_flags("check_data", argv), on_bad_image="skip")  # so that all bad images are named
    train = look_through("train", build_dataset("train", args))
    val = look_through("val", build_dataset("val", args, train.dataset.classes))
    for split in (train, val):
        log("\n".join([f"\n{split.name}: {split.dataset.annotation_file}", *describe(split, args)]))
    log("\n".join(["\nclasses", *class_table(train, val)]))
    log()
    suspicions = list(suspect(train, val, args))
    for line in suspicions:
        warn(line)
    if not suspicions:
        log("nothing suspicious", "green")
    if args.output_dir:
        for split in (train, val):
            log(f"wrote {write_page(split, Path(args.output_dir))}")
    return int(bool(train.unreadable or val.unreadable))


def look_through(name: str, dataset: CocoDetection) -> Split:
    """Read all images of a data set."""

    def read(index: int) -> tuple[tuple[int, int], bytes | None, str, tuple[str, list[str]]]:
        name = dataset.records.file_name(index)
        try:
            picture = dataset.load_image(index)
            notes = [*picture.notes, *unlearnable(dataset, index, picture)]
        except InputError as error:
            return (0, 0), None, str(error), (name, [])
        digest = hashlib.sha256((dataset.image_folder / name).read_bytes()).digest()
        return picture.size, digest, "", (name, notes)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read_all = tqdm(pool.map(read, range(len(dataset))), f"reading {name}", len(dataset), leave=False, disable=None)
        sizes, digests, problems, notes = zip(*read_all, strict=True)
    return Split(name, dataset, np.array(sizes), list(digests), list(filter(None, problems)), list(notes))


def unlearnable(dataset: CocoDetection, index: int, picture: Picture) -> Iterator[str]:
    """Yield a note on an image of panoptic data if some of its segments cannot become targets."""
    if isinstance(dataset, PanopticDetection):
        listed, learned = dataset.records.objects_of(index).labels, dataset.target_of(index, *picture.size)["labels"]
        if missing := len(listed) - len(learned):
            yield f"{counted(missing, 'segment')} without pixels, or with a single row or column of them, left out"


def describe(split: Split, args: Flags) -> Iterator[str]:
    """Yield the report's lines on one split: images, targets, annotations that are left out, areas, padding."""
    dataset, records = split.dataset, split.dataset.records
    visible, targets = dataset.visible_objects()
    counts = np.bincount(records.image_of_object[targets], minlength=len(dataset))
    yield f"  images    {len(dataset):,}, {describe_sizes(split.sizes[split.sizes[:, 0] > 0])}"
    yield (
        f"  targets   {targets.sum():,}: {counts.min()} to {counts.max()} per image, median {np.median(counts):g}; "
        f"{counted((counts == 0).sum(), 'image')} without any"
    )
    _, _, width, height = records.objects.boxes.T
    flat, crowds = (width <= 0) | (height <= 0), records.objects.crowds & ~targets
    left_out = {
        ("crowd region",): crowds,
        ("box without width or height", "boxes without width or height"): ~visible & flat & ~crowds,
        ("box outside of its image", "boxes outside of their image"): ~visible & ~flat & ~crowds,
    }
    parts = [counted(mask.sum(), *nouns) for nouns, mask in left_out.items() if mask.any()]
    yield f"  left out  {', '.join(parts) or 'nothing'}"
    if targets.any():
        groups = np.bincount(np.digitize(records.objects.areas[targets], AREAS), minlength=3) / targets.sum()
        small, medium, large = (f"{100 * share:.0f} %" for share in groups)
        yield f"  areas     {small} small (below 32² pixels), {medium} medium, {large} large (96² and more)"
    padded, pixels = padding(split, args)
    yield (
        f"  padding   in batches of {args.batch_size}, {100 * padded:.0f} % of the images are padded, "
        f"{100 * pixels:.0f} % of the pixels are padding"
    )


def describe_sizes(sizes: np.ndarray) -> str:
    """Describe the smallest and the largest of the sizes [M, 2] of images."""
    if len(sizes) == 0:
        return "none of which can be read"
    by_area = sorted({tuple(size) for size in sizes.tolist()}, key=lambda size: size[0] * size[1])
    (w1, h1), (w2, h2) = by_area[0], by_area[-1]
    if len(by_area) == 1:
        return f"all of {w1}×{h1}"
    return f"of {len(by_area):,} sizes from {w1}×{h1} to {w2}×{h2}"


def padding(split: Split, args: Flags) -> tuple[float, float]:
    """Return the shares of images with padding, and of pixels that are padding, in random batches.

    Images have the evaluation's size, without augmentation.
    """
    readable = split.sizes[split.sizes[:, 0] > 0].tolist()
    if not readable:
        return 0.0, 0.0
    resized = np.array([resized_size(w, h, args.min_size, args.max_size) for w, h in readable])
    drawn = np.random.default_rng(0).integers(len(resized), size=(BATCHES, args.batch_size))
    batches = resized[drawn]  # [batches, images, 2]
    largest = batches.max(1, keepdims=True)
    return float((batches < largest).any(-1).mean()), float(
        1 - batches.prod(-1).sum() / (largest.prod(-1).sum() * args.batch_size)
    )


def class_table(train: Split, val: Split) -> Iterator[str]:
    """Yield a line per class with its targets and images in both splits."""
    classes = train.dataset.classes.names | val.dataset.classes.names
    ids = train.dataset.classes.ids | val.dataset.classes.ids
    width = max(map(len, ["name", *classes.values()]))
    id_width = max(len(str(class_id)) for class_id in [*ids.values(), "id"])
    heads = "  ".join(f"{split.name + ' boxes':>11}  {'images':>7}" for split in (train, val))
    yield f"  {'id':>{id_width}}  {'name':<{width}}  {heads}"
    for label, name in sorted(classes.items()):
        cells = "  ".join(
            f"{boxes:>11,}  {images:>7,}" for boxes, images in (split.boxes_of(label) for split in (train, val))
        )
        yield f"  {ids[label]:>{id_width}}  {name:<{width}}  {cells}"


def suspect(train: Split, val: Split, args: Flags) -> Iterator[str]:
    """Yield a line for everything in the data that is wrong or may be wrong."""
    for split in (train, val):
        if bad := split.unreadable:
            yield f"{counted(len(bad), f'{split.name} image')} cannot be used: {listed(bad)}"
        for line in summarize_notes(split.notes):
            yield f"{split.name}: {line}"
        per_image = np.bincount(split.dataset.records.image_of_object[split.targets], minlength=1)
        for line in crowded_images(per_image, args.num_queries, args.max_detections):
            yield f"{split.name}: {line}"
        if args.num_classes:
            try:
                split.dataset.check_classes(args.num_classes)
            except InputError as error:
                yield str(error)
    counts = {label: [split.boxes_of(label)[0] for split in (train, val)] for label in train.dataset.classes.names}
    named = train.dataset.classes.name_of
    if never := [named(label) for label, (n, _) in counts.items() if n == 0]:
        yield f"{counted(len(never), 'class has', 'classes have')} no box to learn from: {listed(never)}"
    if few := [f"{named(label)} ({n})" for label, (n, _) in counts.items() if 0 < n < FEW_BOXES]:
        classes = counted(len(few), "class has", "classes have")
        yield f"{classes} fewer than {FEW_BOXES} boxes to learn from: {listed(few)}"
    if unscored := [named(label) for label, (n, m) in counts.items() if n and not m]:
        classes = counted(len(unscored), "class that has", "classes that have")
        yield f"AP leaves out {classes} no box in the val split: {listed(unscored)}"
    others = val.dataset.classes.names.keys() - train.dataset.classes.names.keys()
    if unknown := [val.dataset.classes.name_of(label) for label in sorted(others) if val.boxes_of(label)[0]]:
        classes = counted(len(unknown), "class of the val split is", "classes of the val split are")
        yield f"{classes} not in the training file: {listed(unknown)}"
    if leaked := (set(train.digests) & set(val.digests)) - {None}:
        names = [train.dataset.records.file_name(i) for i, digest in enumerate(train.digests) if digest in leaked]
        images = counted(len(leaked), "image is", "images are")
        yield f"{images} in both splits, so that AP is too high: {listed(names)}"
    copies = Counter(digest for digest in train.digests if digest)
    if repeated := sum(number - 1 for number in copies.values()):
        yield counted(repeated, "training image is a copy of another", "training images are copies of others")


def listed(texts: Sequence[str]) -> str:
    return "; ".join(texts[:MOST_LINES]) + ("; .." if len(texts) > MOST_LINES else "")


def write_page(split: Split, folder: Path) -> Path:
    """Write a page of random images with their boxes as `folder`/{split}.jpg; images without boxes are left out."""
    dataset = split.dataset
    readable = np.flatnonzero(split.sizes[:, 0])
    shown = np.intersect1d(np.unique(dataset.records.image_of_object[split.targets]), readable).tolist()
    shown = sorted(random.Random(0).sample(shown, min(PICTURES, len(shown))))
    path = folder / f"{split.name}.jpg"
    with replacing(path) as file:
        contact_sheet([picture(dataset, index) for index in shown], COLUMNS).save(file, format="JPEG", quality=90)
    return path


def picture(dataset: CocoDetection, index: int) -> Image.Image:
    """Return an image with its targets, at the size of a cell of the page."""
    stored = dataset.load_image(index)
    if isinstance(dataset, PanopticDetection):
        return draw_segments(
            ImageOps.contain(to_pil_image(stored.pixels), CELL), *dataset.segments_of(index), dataset.classes
        )
    image = ImageOps.contain(to_pil_image(stored.pixels), CELL)
    objects = dataset.records.objects_of(index)
    codes = dataset.records.codes_of(index)
    masks = [code for code, crowd in zip(codes, objects.crowds, strict=False) if not crowd]
    objects = objects.select(~objects.crowds)
    x, y, width, height = objects.boxes.T
    corners = np.stack([x, y, x + width, y + height], axis=1) * (image.width / stored.size[0])
    labels = objects.labels.tolist()
    return annotate(image, corners.tolist(), labels, [dataset.classes.name_of(label) for label in labels], masks)


if __name__ == "__main__":
    run_command(main)
