"""Search for the images and videos that a command line names, and preparation of images ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from datasets.image_files import best_match, files_by_name
from datasets.json_file import read_json
from util.errors import InputError, reason
from util.text import printable

IMAGES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif", ".heic")
)
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"))

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """An image or video file.

    Attributes:
        path: the path of the file.
        name: a unique name for messages and for the file's picture: the path relative to the given folder, with more
            parent folders if files of several folders would have the same name.
        image_id: the id in `detections.json`: the name, or the id in an annotation file.
    """

    path: Path
    name: str
    image_id: int | str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS

    def __str__(self) -> str:
        return printable(self.name)


def find_sources(patterns: Iterable[str], report: Report, leave_out: Path | None = None) -> list[Source]:
    """Return the files that paths, folders (with all their subfolders) and glob patterns name, each once.

    Args:
        patterns: the inputs of the command line. In folders, only files with suffixes of images and videos count.
        report: receives a line about every pattern without a file.
        leave_out: a folder that is not searched, since the tool's output goes there.
    """
    found: dict[Path, tuple[str, ...]] = {}  # the parts of each file's name
    for pattern in patterns:
        matches = [Path(pattern)] if os.path.lexists(pattern) else _glob(pattern)
        files = [pair for match in matches for pair in _files(match, report, leave_out)]
        if not files:
            what = "no images or videos there" if matches else "no such file or folder, and no file matches"
            report(f"{printable(pattern)}: {what}")
        for path, folder in files:
            found.setdefault(path, path.relative_to(folder).parts)
    names = _distinct_names(found)
    return [Source(path, name, name) for path, name in zip(found, names, strict=True)]


def _glob(pattern: str) -> list[Path]:
    """Return the paths that match a pattern, in which `**` stands for folders at any depth; [] if it is not valid."""
    root = Path(Path(pattern).anchor)
    try:
        return sorted(root.glob(str(Path(pattern).relative_to(root))))
    except (ValueError, IndexError):  # as for "a**b" and ""
        return []


def _files(path: Path, report: Report, leave_out: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yield a file, or a folder's images and videos by name, each with the folder to which its name is relative."""
    if not path.is_dir():
        folder = path.parent.resolve()
        yield folder / path.name, folder
        return
    path = path.resolve()
    for parent, folders, files in os.walk(path, onerror=lambda error: report(f"{error.filename}: {error.strerror}")):
        inside = [name for name in folders if not name.startswith(".") and Path(parent, name) != leave_out]
        folders[:] = sorted(inside)
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGES | VIDEOS and not name.startswith("."):
                yield Path(parent, name), path


def _distinct_names(files: dict[Path, tuple[str, ...]]) -> list[str]:
    """Return each file's name, with as many parent folders as are needed for all names to differ."""
    more, names = 0, [""] * 2
    while len(set(names)) < len(names):
        names = ["/".join(path.parts[max(1, len(path.parts) - len(parts) - more) :]) for path, parts in files.items()]
        more += 1
    return names


def with_annotated_ids(sources: Sequence[Source], annotations: str, report: Report) -> list[Source]:
    """Return the sources with the image ids of a COCO file, whose file names are the last parts of their paths.

    Names may differ from the files' names in the same ways as for training data (`datasets.image_files`). Sources that
    the COCO file does not list, and further sources for the same image, are reported and left out.

    Raises:
        InputError: if the file is not usable.
    """
    data = read_json(Path(annotations))
    try:
        ids = {entry["file_name"]: entry["id"] for entry in data["images"]}
        similar = files_by_name(ids)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{annotations}: not a COCO file that lists images ({reason(error)})") from error
    chosen: dict[int | str, Source] = {}
    for source in sources:
        parts = source.path.parts
        endings = ("/".join(parts[start:]) for start in range(1, len(parts)))
        exact = next((ending for ending in endings if ending in ids), None)
        image_id = ids.get(exact or best_match(str(source.path), similar))
        if image_id is None:
            report(f"{source}: {annotations} does not list it, skipped")
        elif image_id in chosen:
            report(f"{source}: is image {image_id} of {annotations} like {chosen[image_id]}, skipped")
        else:
            chosen[image_id] = Source(source.path, source.name, image_id)
    return list(chosen.values())


def bounded_batches(
    items: Iterable[Item], number: int, weigh: Callable[[Item], int], most: int
) -> Iterator[list[Item]]:
    """Yield the items in lists of at most `number`, or fewer if their total weight would exceed `most`."""
    batch: list[Item] = []
    load = 0
    for item in items:
        weight = weigh(item)
        if batch and (len(batch) == number or load + weight > most):
            yield batch
            batch, load = [], 0
        batch.append(item)
        load += weight
    if batch:
        yield batch


def prefetch(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    weigh: Callable[[Item], int] = lambda item: 0,
    most: int = 0,
) -> Iterator[Result]:
    """Yield `function` of every item, in order; the pool works ahead of the caller.

    The pool works on at most `ahead` items, or fewer if their total weight would exceed `most`.
    """
    pending: deque[tuple[Future, int]] = deque()
    for item in items:
        weight = weigh(item)
        while len(pending) >= ahead or (pending and sum(w for _, w in pending) + weight > most):
            yield pending.popleft()[0].result()
        pending.append((pool.submit(function, item), weight))
        del item  # so that a picture is not kept here as well
    while pending:
        yield pending.popleft()[0].result()
