"""Find objects in images and videos, and show them in pictures and in a gallery.

    python -m scripts.predict --checkpoint CHECKPOINT --output DIR INPUT...

INPUT: image and video files, folders (with all their subfolders), patterns such as 'photos/*.jpg'. The tool writes to
DIR:

- `detections.json`: all detections (100 per image) in COCO's result format, with the data's category ids and names, and
  with run-length codes of the masks if the model has masks. `image_id` is the file's name or, with --annotations, the
  image's id in a COCO file. A video's frame has an `image_id` such as `clip.mp4#000123`, counted from 0, and its `time`
  in seconds.
- `panoptic/` and `panoptic.json`, for a panoptic model: the segments of images in COCO's format.
- `pictures/`: every image at full size with the boxes, masks, names and scores above --threshold, or with the segments
  of a panoptic model; videos as mp4 with their frame times, without sound.
- `index.html`: a gallery with a slider for the score; its images are in `images/`, at most 1280 pixels long, and also
  in the page itself if all of them together have at most 32 MB.

Files of an earlier prediction with the same names are replaced. Photos are turned according to their EXIF orientation;
with --annotations they are used as stored, as in COCO's evaluation. All images of a batch have the same shape: there is
no padding, and --batch_size does not change the detections. Files that cannot be read are named and skipped; the exit
code is then 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("predict")

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, islice
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from datasets.images import image_size, read_image, summarize_notes
from datasets.samplers import same_shape_batches
from datasets.transforms import resized_size
from evaluation.coco_results import coco_results, write_coco_results
from evaluation.panoptic_results import png_and_segments, write_panoptic_results
from flags.limits import check_sizes
from flags.resolve import IMAGE_SIZES, resolve
from run.kernels import keep_freed_memory
from scripts.detector import Detector, load_detector
from scripts.prediction.gallery import Entry, image_entry, video_entry, write_gallery
from scripts.prediction.inputs import Report, Source, bounded_batches, find_sources, prefetch, with_annotated_ids
from scripts.prediction.photo import GALLERY_SIDE, MAX_JPEG_SIDE, Detections, Photo, file_name, save, weight_of
from scripts.prediction.video import Frame, VideoReader, write_video
from util.command import run_command
from util.errors import InputError
from util.files import replacing
from util.logger import log, warn
from util.text import counted

MOST_PIXELS = 128_000_000  # in each stage (read, detected, drawn) at the same time: 10 photos of a phone

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prediction:
    """Prediction: finds objects in images and videos, draws them, and collects the results.

    Args:
        args: the flags of the command line.
        detector: the model.
        pool: threads that read and draw.
        report: receives a line about every input that cannot be used.
    """

    def __init__(self, args: argparse.Namespace, detector: Detector, pool: Executor, report: Report) -> None:
        self.args = args
        self.detector = detector
        self.pool = pool
        self.report = report
        self.detections: dict[Source, list[tuple[int | str, Detections, Fraction | None]]] = {}  # id and frame's time
        self.notes: list[tuple[str, list[str]]] = []  # on images, by name
        self.entries: dict[Source, Entry] = {}  # of the gallery

    def images(self, sources: Sequence[Source]) -> None:
        """Predict on image files."""
        sizes = zip(sources, self._in_threads(self._size, sources), strict=True)
        usable = [(source, size) for source, size in sizes if self._is_usable(size)]
        limits = self.detector.args.min_size, self.detector.args.max_size
        shapes = [resized_size(w, h, *limits) for _, (w, h) in usable]
        pixels = {source: width * height for source, (width, height) in usable}
        of_one_shape = [[usable[i][0] for i in batch] for batch in same_shape_batches(shapes, self.args.batch_size)]
        batches = [part for batch in of_one_shape for part in self._batches(batch, pixels.__getitem__)]
        photos = self._in_threads(self._read, chain.from_iterable(batches), pixels.__getitem__)
        detected = self._detect(islice(photos, len(batch)) for batch in batches)
        with tqdm(total=len(usable), desc="images", disable=None) as bar:
            for photo, entry in self._in_threads(self._draw, detected, weight_of):
                self.detections[photo.source] = [(photo.image_id, photo.detections, None)]
                self.notes.append((str(photo.source), photo.notes))
                self.entries[photo.source] = entry
                bar.update()

    def video(self, source: Source) -> None:
        """Predict on a video file, up to the point where it is damaged."""
        try:
            reader = VideoReader(source.path, self.args.every)
        except InputError as error:
            self.report(f"{source}: {error}, skipped")
            return
        frames = self._until_damaged(source, reader)
        photos = self._in_threads(self._photo_of, frames, lambda frame: frame[1].pixels[..., 0].size)
        detected = self._detect(self._batches(photos, weight_of))
        drawn = self._in_threads(
            lambda photo: (photo, photo.annotated(self.args.threshold, self.detector.classes)),
            detected,
            weight_of,
        )
        first = next(drawn, None)
        if first is None:
            return
        path = self.args.output / "pictures" / file_name(source, ".mp4")
        self.detections[source] = []
        with (
            tqdm(total=reader.length, desc=str(source), disable=None) as bar,
            write_video(path, reader.rate, reader.time_base, first[1].size) as write,
        ):
            for photo, image in chain([first], drawn):
                assert photo.frame is not None  # it comes from a video
                write(image, *photo.frame)
                photo.detections.pop("panoptic", None)  # the pixels of all frames would fill the memory
                self.detections[source].append((photo.image_id, photo.detections, photo.frame[0]))
                bar.update()
        self.entries[source] = video_entry(str(source), path.relative_to(self.args.output))

    def coco_results(self, sources: Iterable[Source]) -> Iterator[dict[str, Any]]:
        """Yield the COCO results of all detections, in the order of the sources."""
        for source in sources:
            for image_id, detections, time in self.detections.get(source, ()):
                boxes = box_convert(detections["boxes"], "xyxy", "xywh")
                columns = (part.tolist() for part in (detections["labels"], detections["scores"], boxes))
                found, codes = zip(*columns, strict=True), detections.get("codes", ())
                for result in coco_results(image_id, found, self.detector.classes, codes=codes):
                    yield result if time is None else result | {"time": round(float(time), 6)}

    def segmented(self, sources: Iterable[Source]) -> list[dict[str, Any]]:
        """Return the panoptic annotations of all images, in the order of the sources; [] without a panoptic model."""
        found = (detections for source in sources for _, detections, _ in self.detections.get(source, ()))
        return [detections["panoptic"] for detections in found if "panoptic" in detections]

    def summary(self) -> str:
        """Return a line with the number of boxes that are drawn or, if no box is drawn, the highest score."""
        scores = [found["scores"] for of_source in self.detections.values() for _, found, _ in of_source]
        number = sum(int((of_image >= self.args.threshold).sum()) for of_image in scores)
        if number:
            return f"{counted(number, 'box scores', 'boxes score')} {self.args.threshold:g} or more"
        highest = max(of_image.max().item() for of_image in scores)
        return f"no box scores {self.args.threshold:g} or more, the highest score is {highest:.2g}: lower --threshold"

    def _in_threads(
        self, function: Callable[[Item], Result], items: Iterable[Item], weigh: Callable[[Item], int] = lambda _: 0
    ) -> Iterator[Result]:
        return prefetch(self.pool, function, items, self.args.num_workers + self.args.batch_size, weigh, MOST_PIXELS)

    def _batches(self, items: Iterable[Item], weigh: Callable[[Item], int]) -> Iterator[list[Item]]:
        return bounded_batches(items, self.args.batch_size, weigh, MOST_PIXELS)

    def _detect(self, batches: Iterable[Iterable[Photo | InputError]]) -> Iterator[Photo]:
        """Yield the photos of the batches after adding their detections."""
        for batch in batches:
            photos = [photo for photo in batch if self._is_usable(photo)]
            if not photos:
                continue
            sizes = [photo.size[::-1] for photo in photos]
            for detections in self.detector.detect([photo.resized for photo in photos], sizes):
                photos[0].detections = detections
                yield photos.pop(0)  # so that it is not kept after it is drawn

    def _is_usable(self, item: Item | InputError) -> TypeGuard[Item]:
        """Return whether an item is no error, and report errors; they are values, so that other threads continue."""
        if isinstance(item, InputError):
            self.report(str(item))
        return not isinstance(item, InputError)

    def _size(self, source: Source) -> tuple[int, int] | InputError:
        try:
            return image_size(source.path, upright=not self.args.annotations, name=source)
        except InputError as error:
            return InputError(f"{error}, skipped")

    def _read(self, source: Source) -> Photo | InputError:
        try:
            picture = read_image(source.path, not self.args.annotations, self.args.max_megapixels, name=source)
        except InputError as error:
            return InputError(f"{error}, skipped")
        resized = self.detector.resize(picture.pixels)
        return Photo(source, source.image_id, picture.pixels, picture.size, resized, notes=picture.notes)

    def _photo_of(self, item: tuple[Source, Frame]) -> Photo:
        source, frame = item
        pixels = torch.from_numpy(np.ascontiguousarray(frame.pixels)).permute(2, 0, 1)
        size, image_id = (pixels.shape[2], pixels.shape[1]), f"{source.image_id}#{frame.number:06}"
        return Photo(source, image_id, pixels, size, self.detector.resize(pixels), (frame.time, frame.duration))

    def _until_damaged(self, source: Source, reader: VideoReader) -> Iterator[tuple[Source, Frame]]:
        """Yield the frames of a video that can be read."""
        try:
            for frame in reader:
                yield source, frame
        except InputError as error:
            self.report(f"{source}: {error}")

    def _draw(self, photo: Photo) -> tuple[Photo, Entry]:
        """Save the pictures of a photo, and return it with its entry of the gallery."""
        name = file_name(photo.source, ".jpg")
        save(
            photo.annotated(self.args.threshold, self.detector.classes),
            self.args.output / "pictures" / name,
            MAX_JPEG_SIDE,
        )
        save(to_pil_image(photo.pixels), self.args.output / "images" / name, GALLERY_SIDE)
        if "panoptic" in photo.detections:
            photo.detections["panoptic"] = self._write_segments(photo)
        return photo, image_entry(str(photo.source), Path("images", name), photo.size, photo.detections)

    def _write_segments(self, photo: Photo) -> dict[str, Any]:
        """Write the PNG file of an image's segments, and return their entry in COCO's format."""
        png, segments = png_and_segments(photo.detections["panoptic"])
        name = file_name(photo.source, ".png")
        with replacing(self.args.output / "panoptic" / name) as file:
            file.write(png)
        return {"image_id": photo.image_id, "file_name": name, "segments_info": segments}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parse_flags("predict", argv)
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        warn(problem)

    sources = find_sources(args.inputs, report, leave_out=args.output.resolve())
    if args.annotations:
        sources = with_annotated_ids(sources, args.annotations, report)
    if not sources:
        raise InputError("nothing to predict on: INPUT names no image and no video that can be used; check the paths")
    keep_freed_memory(torch.device(args.device))
    detector = load_detector(args.checkpoint, args.device)
    sizes = {flag: value for flag in IMAGE_SIZES if (value := getattr(args, flag))}
    detector.args = resolve(detector.args, **sizes)
    check_sizes(detector.args)
    if detector.postprocess_panoptic and args.panoptic_threshold is not None:
        detector.postprocess_panoptic.threshold = args.panoptic_threshold
    detector.postprocess.num_detections = args.max_detections or detector.postprocess.num_detections
    detector.model, detector.amp = detector.model.prepared(), args.amp

    with ThreadPoolExecutor(args.num_workers or 1) as pool:
        prediction = Prediction(args, detector, pool, report)
        prediction.images([source for source in sources if not source.is_video])
        for source in sources:
            if source.is_video:
                prediction.video(source)
    if not prediction.detections:
        raise InputError(f"none of {counted(len(sources), 'input')} could be read")
    write_coco_results(args.output / "detections.json", prediction.coco_results(sources))
    if segmented := prediction.segmented(sources):
        write_panoptic_results(args.output / "panoptic.json", segmented, detector.classes)
    entries = [prediction.entries[source] for source in sources if source in prediction.entries]
    write_gallery(args.output / "index.html", entries, detector.classes, args.threshold)
    for line in summarize_notes(prediction.notes):
        log(line)
    log(prediction.summary())
    log(f"{len(entries)} of {counted(len(sources), 'input')} predicted; look at {args.output / 'index.html'}")
    if problems:
        log(f"not usable, or only in part: {counted(len(problems), 'input')}, named in the warnings above")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
