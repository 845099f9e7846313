"""Finds objects in images and videos, and shows them in pictures and in a gallery.

    python -m scripts.predict --checkpoint CHECKPOINT --output DIR INPUT...

INPUT: image and video files, folders (with all below them), patterns such as 'photos/*.jpg'. DIR receives

- `detections.json`: COCO's result format, all detections (100 an image), with the data's category ids and names;
  `image_id` is the file's name or, with --annotations, the id that a COCO file gives it; that of a video's frame
  is `clip.mp4#000123`, counted from 0;
- `pictures/`: every image at its size with the boxes, names and scores above --threshold; videos as mp4;
- `index.html`, a gallery with a slider for the score, and its images in `images/`, at most 1280 pixels long;
  up to 32 MB of them are in the page itself, too.

An earlier prediction's files of the same names are replaced. Photos are turned as their EXIF orientation says; with
--annotations they are taken as stored, as in COCO's evaluation. Images of a batch have one shape, so that nothing is
padded and --batch_size does not change what is found. What cannot be read is named and skipped, for an exit code of 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, for which Python looks for modules in scripts/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from datasets.images import decode, decode_upright, upright_size
from datasets.results import coco_results, write_results
from datasets.samplers import same_shape_batches
from datasets.transforms import resized_size
from scripts.detector import Detector, load_detector
from scripts.gallery import Entry, image_entry, video_entry, write_gallery
from scripts.inputs import Report, Source, find_sources, open_image, prefetch, with_annotated_ids
from scripts.video import VideoReader, write_video
from util.args import worker_count
from util.command import run_command
from util.errors import InputError, reason
from util.logger import log, warn
from util.pictures import annotate

GALLERY_SIDE = 1280  # pixels: enough for a screen, a tenth of a photo's bytes
MAX_JPEG_SIDE = 65_500  # pixels; what the format holds

Found = dict[str, Tensor]  # as `PostProcess` gives it
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass
class Photo:
    """An image on its way: threads read and draw it, the model looks at it in between.

    Attributes:
        source: the file that it comes from.
        image_id: its id in results.
        pixels: uint8 [3, h, w].
        resized: the same at the model's size.
        found: what the model found; empty before.
    """

    source: Source
    image_id: int | str
    pixels: Tensor
    resized: Tensor
    found: Found = field(default_factory=dict)


class Prediction:
    """Finds objects in images and videos, draws them, and keeps what is to be written in the end.

    Args:
        args: the command line's.
        detector: the model.
        pool: threads that read and draw.
        report: is told in a line about every input that cannot be used.
    """

    def __init__(self, args: argparse.Namespace, detector: Detector, pool: Executor, report: Report) -> None:
        self.args = args
        self.detector = detector
        self.pool = pool
        self.report = report
        self.found: dict[Source, list[tuple[int | str, Found]]] = {}  # by image id; a video has many
        self.entries: dict[Source, Entry] = {}  # of the gallery

    def images(self, sources: Sequence[Source]) -> None:
        """Predicts on image files."""
        sizes = zip(sources, self._in_threads(self._size, sources), strict=True)
        usable = [(source, size) for source, size in sizes if self._is_usable(size)]
        limits = self.detector.args.min_size, self.detector.args.max_size
        shapes = [resized_size(*size, *limits) for _, size in usable]
        batches = [[usable[i][0] for i in batch] for batch in same_shape_batches(shapes, self.args.batch_size)]
        photos = self._in_threads(self._read, chain.from_iterable(batches))
        detected = self._detect(islice(photos, len(batch)) for batch in batches)
        with tqdm(total=len(usable), desc="images", disable=None) as bar:
            for photo, entry in self._in_threads(self._draw, detected):
                self.found[photo.source] = [(photo.image_id, photo.found)]
                self.entries[photo.source] = entry
                bar.update()

    def video(self, source: Source) -> None:
        """Predicts on a video file, up to where it is damaged."""
        try:
            reader = VideoReader(source.path, self.args.every)
        except InputError as error:
            self.report(f"{source}: {error}, skipped")
            return
        photos = self._in_threads(self._frame, self._until_damaged(source, reader))
        detected = self._detect(iter(lambda: list(islice(photos, self.args.batch_size)), []))
        drawn = self._in_threads(lambda photo: (photo, self._annotated(photo)), detected)
        first = next(drawn, None)
        if first is None:
            return
        path = self.args.output / "pictures" / file_name(source, ".mp4")
        self.found[source] = []
        with (
            tqdm(total=reader.length, desc=str(source), disable=None) as bar,
            write_video(path, reader.rate, first[1].size) as write,
        ):
            for photo, image in chain([first], drawn):
                write(image)
                self.found[source].append((photo.image_id, photo.found))
                bar.update()
        self.entries[source] = video_entry(str(source), path.relative_to(self.args.output))

    def results(self, sources: Iterable[Source]) -> Iterator[dict[str, Any]]:
        """All detections in COCO's result format, in the order of the sources."""
        for source in sources:
            for image_id, found in self.found.get(source, ()):
                boxes = box_convert(found["boxes"], "xyxy", "xywh")
                detections = zip(*(part.tolist() for part in (found["labels"], found["scores"], boxes)), strict=True)
                yield from coco_results(image_id, detections, self.detector.classes)

    def _in_threads(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        return prefetch(self.pool, function, items, ahead=self.args.num_workers + self.args.batch_size)

    def _detect(self, batches: Iterable[Iterable[Photo | InputError]]) -> Iterator[Photo]:
        """The photos of batches, with what the model finds."""
        for batch in batches:
            photos = [photo for photo in batch if self._is_usable(photo)]
            if not photos:
                continue
            sizes = [photo.pixels.shape[1:] for photo in photos]
            found = self.detector.detect([photo.resized for photo in photos], sizes)
            for photo, photo.found in zip(photos, found, strict=True):
                yield photo

    def _is_usable(self, item: Any) -> bool:
        """Reports what is an error; errors come as values, since threads go on meanwhile."""
        if isinstance(item, InputError):
            self.report(str(item))
        return not isinstance(item, InputError)

    def _size(self, source: Source) -> tuple[int, int] | InputError:
        return open_image(source, (lambda file: file.size) if self.args.annotations else upright_size)

    def _read(self, source: Source) -> Photo | InputError:
        pixels = open_image(source, decode if self.args.annotations else decode_upright)
        if isinstance(pixels, InputError):
            return pixels
        return Photo(source, source.image_id, pixels, self.detector.resize(pixels))

    def _frame(self, frame: tuple[Source, int, np.ndarray]) -> Photo:
        source, number, pixels = frame
        pixels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        return Photo(source, f"{source.image_id}#{number:06}", pixels, self.detector.resize(pixels))

    def _until_damaged(self, source: Source, reader: VideoReader) -> Iterator[tuple[Source, int, np.ndarray]]:
        """The frames of a video that can be read."""
        try:
            for number, pixels in reader:
                yield source, number, pixels
        except InputError as error:
            self.report(f"{source}: {error}")

    def _draw(self, photo: Photo) -> tuple[Photo, Entry]:
        """Saves the pictures of an image."""
        name = file_name(photo.source, ".jpg")
        save(self._annotated(photo), self.args.output / "pictures" / name, MAX_JPEG_SIDE)
        image = to_pil_image(photo.pixels)
        size = image.size
        save(image, self.args.output / "images" / name, GALLERY_SIDE)
        return photo, image_entry(str(photo.source), Path("images", name), size, photo.found)

    def _annotated(self, photo: Photo) -> Image.Image:
        shown = photo.found["scores"] >= self.args.threshold
        boxes, labels, scores = (photo.found[key][shown].tolist() for key in ("boxes", "labels", "scores"))
        texts = [
            f"{self.detector.classes.name_of(label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)
        ]
        return annotate(to_pil_image(photo.pixels), boxes, labels, texts)


def file_name(source: Source, suffix: str) -> str:
    """What a source's picture is called: as itself, with a suffix for its format where it has another."""
    return source.name if source.name.lower().endswith(suffix) else source.name + suffix


def save(image: Image.Image, path: Path, longest: int) -> None:
    """Writes a JPEG file, scaled down where a side exceeds `longest`; the image may be changed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.thumbnail((longest, longest))
        image.save(path, "JPEG", quality=90)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or reason(error)})") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's flags. Raises InputError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.predict",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, videos, folders, or patterns such as 'photos/*.jpg'")
    add("--checkpoint", required=True, help="a checkpoint, a URL or a hub entry's name")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for what is found")
    add("--threshold", default=0.3, type=float, help="lowest score in pictures, and at first in the gallery")
    add("--annotations", default=None, metavar="FILE", help="COCO JSON file that gives image ids; images as stored")
    add("--every", default=1, type=int, metavar="N", help="of videos, take every N-th frame")
    add("--min_size", default=None, type=int, help="short side for the model; unset: that of its training")
    add("--max_size", default=None, type=int, help="largest long side; unset: that of its training")
    add("--batch_size", default=4, type=int, help="images that the model looks at together")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    add("--num_workers", default="auto", type=worker_count, help="threads that read and draw; auto: one a CPU")
    args = parser.parse_args(argv)
    for flag in ("every", "min_size", "max_size", "batch_size", "num_workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: scores are between 0 and 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    args = parse(argv)
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        warn(problem)

    warnings.filterwarnings("ignore", module="PIL")  # about sizes and metadata that keep no image from being used
    sources = find_sources(args.inputs, report, leave_out=args.output.resolve())
    if args.annotations:
        sources = with_annotated_ids(sources, args.annotations, report)
    if not sources:
        raise InputError("nothing to predict on: the inputs name no image and no video that can be used")
    detector = load_detector(args.checkpoint, args.device)
    for flag in ("min_size", "max_size"):
        setattr(detector.args, flag, getattr(args, flag) or getattr(detector.args, flag))

    with ThreadPoolExecutor(args.num_workers) as pool:
        prediction = Prediction(args, detector, pool, report)
        prediction.images([source for source in sources if not source.is_video])
        for source in sources:
            if source.is_video:
                prediction.video(source)
    if not prediction.found:
        raise InputError(f"none of the {len(sources)} inputs could be read")
    write_results(args.output / "detections.json", prediction.results(sources))
    entries = [prediction.entries[source] for source in sources if source in prediction.entries]
    write_gallery(args.output / "index.html", entries, detector.classes, args.threshold)
    log(f"{len(entries)} of {len(sources)} inputs predicted; look at {args.output / 'index.html'}")
    if problems:
        log(f"not usable, or only in part: {len(problems)}, named in the warnings above")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
