"""Search for annotations and images under --coco_path, in the layouts of COCO and of common exporters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from util.errors import InputError

TEST_DEV = "image_info_test-dev2017.json"  # lists the images of test2017 that COCO's server scores
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
NO_SPLIT = "instances_default"  # CVAT's name for annotations without a split
MOST_NAMED = 6  # files in an error


def find_split(
    root: Path, split: str, annotations: str | None, images: str | None, alone: bool = False
) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split, unless `annotations` or `images` gives it.

    COCO's and DETR's layouts come first, then those of common exporters: `train/_annotations.coco.json` next to its
    images, `annotations/train.json` with `images/train/`, `train/` or `images/`. A match must be unique if
    its name differs in case, or if the export has a folder per split.

    Args:
        alone: no other split is expected in `root`, so an export without a split in its names is taken for this one.

    Raises:
        InputError: if there is no such file or folder, or several; it names the flags to use and the files found.
    """
    file = Path(annotations) if annotations is not None else find_annotations(root, split, alone)
    return file, Path(images) if images is not None else find_images(root, split, file)


def find_images(root: Path, split: str, file: Path) -> Path:
    """Return the image folder of a split, whose annotation file is `file`; raise InputError if there is none."""
    folders = list(map(ignoring_case, image_folders(root, split, file)))
    existing = (folder for folder in folders if folder.is_dir())
    folder = next(filter(holds_files, folders), None) or next(existing, None)
    if folder is None:
        advice = "; add test2017/" if split == "test" else f"; name it with --{split}_images"
        raise InputError(f"--coco_path {root}: no folder of the {split} images{advice}")
    return folder


def find_panoptic(root: Path, split: str, annotations: str | None) -> tuple[Path, Path]:
    """Return the panoptic annotation file of a split and the folder of its PNG files.

    The file is `annotations/panoptic_{split}2017.json`, or has another usual name of the split. The folder of its PNG
    files has the same name and is next to it, one level above, or in `root`.

    Raises:
        InputError: if there is no such file or folder.
    """
    names = [f"panoptic_{split}2017", *(f"panoptic_{name}" for name in ALIASES[split])]
    places = [root / "annotations" / f"{name}.json{end}" for name in names for end in ("", ".gz")]
    file = Path(annotations) if annotations else next(filter(Path.is_file, places), None)
    if file is None:
        raise InputError(f"--coco_panoptic_path {root}: no {places[0].relative_to(root)}; {describe_json(root)}")
    name = file.name.split(".")[0]
    folders = [file.parent / name, file.parent.parent / name, root / name]
    folder = next(filter(Path.is_dir, folders), None)
    if folder is None:
        raise InputError(f"{file}: no folder {name} with its PNG files, next to it or in {file.parent.parent}")
    return file, folder


def find_annotations(root: Path, split: str, alone: bool) -> Path:
    """Return the annotation file of a split; see `find_split` for arguments and errors."""
    places = list(annotation_files(root, split))
    if file := next(filter(Path.is_file, places), None):
        return file
    if split == "test":
        raise InputError(f"--coco_path {root}: no annotations/{TEST_DEV}; {describe_json(root)}")
    places += exported_files(root, split)
    found = sorted({path for path in map(ignoring_case, places) if path.is_file()})
    if alone and not found:
        found = sorted((root / "annotations").glob("instances_*.json*"))
        found = found if [path.name.split(".")[0] for path in found] == [NO_SPLIT] else []
    if len(found) == 1:
        return found[0]
    problem = f"no annotations of the {split} images; {describe_json(root)}"
    if found:
        names = ", ".join(str(path.relative_to(root)) for path in found[:MOST_NAMED])
        problem = f"several files may be the annotations of the {split} images: {names}"
    raise InputError(
        f"--coco_path {root}: {problem}; name the file with --{split}_annotations and its images with --{split}_images"
    )


def annotation_files(root: Path, split: str) -> Iterator[Path]:
    """Yield possible paths of a split's annotation file, the most common first, each also with `.gz`."""
    if split == "test":
        yield root / "annotations" / TEST_DEV
        return
    places = [root / "annotations" / f"instances_{split}2017.json"]
    for name in ALIASES[split]:
        places += [root / "annotations" / f"instances_{name}.json", root / "annotations" / f"{name}.json"]
        places += [root / name / "_annotations.coco.json", root / name / "annotations.json", root / f"{name}.json"]
        places += [root / "annotations" / f"{name}_annotations.json", root / f"{name}_annotations.json"]
    for path in places:
        yield path
        yield path.with_name(f"{path.name}.gz")


def exported_files(root: Path, split: str) -> Iterator[Path]:
    """Yield possible paths of the annotation file in a folder that an exporter wrote for this split."""
    for name in ALIASES[split]:
        for file in (f"instances_{name}.json", f"{NO_SPLIT}.json"):
            yield root / name / "annotations" / file
            yield root / name / "annotations" / f"{file}.gz"


def image_folders(root: Path, split: str, file: Path) -> Iterator[Path]:
    """Yield possible image folders of a split, the most common first; `file` is its annotation file."""
    near = file.parent
    export = near.parent if near.name == "annotations" else near
    if export.is_relative_to(root):
        yield export / "images" / file.name.split(".")[0].removeprefix("instances_")
    yield from (root / "images" / f"{split}2017", root / f"{split}2017")
    for name in ALIASES[split]:
        yield from (root / "images" / name, root / name / "images", root / name)
    yield from (near, root / "images", root)


def ignoring_case(path: Path) -> Path:
    """Return a path, or the unique existing path that differs from it only in upper and lower case."""
    if path.exists() or path.parent == path:
        return path
    parent = ignoring_case(path.parent)
    try:
        same = [child for child in parent.iterdir() if child.name.casefold() == path.name.casefold()]
    except OSError:
        return path
    return same[0] if len(same) == 1 else path


def holds_files(folder: Path) -> bool:
    """Return whether a folder has a file that is not JSON."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_file() and not entry.name.endswith((".json", ".gz")) for entry in entries)
    except OSError:
        return False


def describe_json(root: Path) -> str:
    """Return a part of a message that lists the JSON files in a folder."""
    paths = (path for pattern in ("*.json*", "*/*.json*", "*/*/*.json*") for path in sorted(root.glob(pattern)))
    found = [str(path.relative_to(root)) for path in islice(paths, MOST_NAMED)]
    return f"it holds {', '.join(found)}" if found else "it holds no JSON file"
