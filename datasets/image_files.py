"""Search for the image files that annotations name, also under slightly different names."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from util.errors import InputError
from util.logger import warn
from util.text import counted

# Names of folders with pictures that are not photos, but may have the names of photos.
NO_PHOTOS = frozenset(
    {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations", "gt"}
    | {"segmentationclass", "segmentationobject", "groundtruth", "ground_truth", "depth", "overlays", "predictions"}
    | {"thumbnails", "thumbs", "visualization", "visualizations"}
)


def find_image_files(names: Sequence[str], folder: Path, source: str | Path, on_bad_image: str = "error") -> list[str]:
    """Return the path of each image relative to `folder`; `names` are the file names in the annotation file `source`.

    If no file has exactly this name, one matches that differs only in what programs and systems change: parent folders,
    backslashes, escapes such as %20, upper and lower case, composed letters. The match must be unique. It may be
    anywhere in the folder, except in folders of `NO_PHOTOS` that the name does not contain.

    Raises:
        InputError: if the folder is missing, a name leads out of it, or files are missing; the message has their number
            and some names. With `on_bad_image` "skip", missing files are only a warning, as long as one file exists.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such image folder")
    plain = [name if is_inside(name) else "" for name in names]
    present = {parent: _files_in(folder / parent) for parent in {Path(name).parent for name in plain}}
    found = [name if Path(name).name in present[Path(name).parent] else "" for name in plain]
    if all(found):
        return found
    similar = files_by_name(_walk(folder))
    others = {i: best_match(names[i], similar, NO_PHOTOS) for i, name in enumerate(found) if not name}
    claimed = Counter([*filter(None, found), *others.values()])
    others = {i: match if claimed[match] == 1 else "" for i, match in others.items()}  # one image per file
    renamed = [i for i, match in others.items() if match]
    if renamed:
        first = names[renamed[0]], others[renamed[0]]
        were = "was" if len(renamed) == 1 else "were"
        warn(
            f"{folder}: {len(renamed)} of {counted(len(names), 'image')} {were} found under a slightly different name, "
            f"such as {first[1]!r} for {first[0]!r}"
        )
    missing = sorted(names[i] for i, match in others.items() if not match)
    if outside := [name for name in missing if not is_inside(name)]:
        raise InputError(
            f"{source}: {outside[0]!r} leaves the image folder {folder}, and no file in it has that name; "
            "name files relative to it, without '..'"
        )
    if missing:
        report_missing(missing, len(names), folder, source, on_bad_image)
    return [name or others[i] or names[i] for i, name in enumerate(found)]


def is_inside(name: str) -> bool:
    """Return whether a name stays within the folder to which it is relative."""
    return not Path(name).anchor and ".." not in Path(name).parts


def report_missing(missing: list[str], total: int, folder: Path, source: str | Path, on_bad_image: str) -> None:
    """Raise InputError about missing files; with `on_bad_image` "skip", only warn, unless all are missing."""
    first = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
    are = "is" if len(missing) == 1 else "are"
    message = f"{folder}: {len(missing)} of {counted(total, 'image')} of {source} {are} missing: {first}"
    if len(missing) == total:
        raise InputError(f"{message}; is it the right folder?")
    if on_bad_image == "error":
        raise InputError(f"{message}; add what is missing, or pass --on_bad_image skip")
    warn(f"{message}; skipped")


def _key(path: str) -> tuple[str, ...]:
    """Return the parts of a path, last one first, in a form that programs and systems do not change."""
    plain = unicodedata.normalize("NFC", unquote(path).replace("\\", "/")).casefold()
    return tuple(part for part in reversed(PurePosixPath(plain).parts) if part not in ("/", "..", "."))


def files_by_name(paths: Iterable[str]) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Return {key of the file name: [(keys of all parts, path), ..]} for some paths."""
    files = defaultdict(list)
    for path in paths:
        if key := _key(path):
            files[key[0]].append((key, path))
    return files


def best_match(
    name: str, files: dict[str, list[tuple[tuple[str, ...], str]]], ignored: frozenset[str] = frozenset()
) -> str:
    """Return the file whose path shares the most parts with a name, from the end; "" if it is not unique.

    Files in `ignored` folders count only for names that contain these folders.
    """
    key = _key(name)
    named = files.get(key[0], []) if key else []
    candidates = [(other, path) for other, path in named if not ignored.intersection(other[1:]).difference(key)]
    shared = [_shared(key, other) for other, _ in candidates]
    if not shared or shared.count(max(shared)) > 1:
        return ""
    return candidates[shared.index(max(shared))][1]


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Return the number of parts that two keys share from their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files below a folder; symbolic links to folders are not followed."""
    for parent, _, names in os.walk(folder):
        for name in sorted(_files_in(Path(parent)) & set(names)):
            yield Path(parent, name).relative_to(folder).as_posix()


def _files_in(folder: Path) -> set[str]:
    """Return the names of a folder's files; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except OSError:
        return set()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a symbolic link to itself
        return False
