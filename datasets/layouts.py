"""The layouts of data sets that are found under --coco_path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from util.errors import InputError

TEST_DEV = "image_info_test-dev2017.json"  # of the images in test2017, those that COCO's server scores
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
MOST_NAMED = 6  # files in an error


def find_split(root: Path, split: str, annotations: str | None, images: str | None) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split, of which one may be known already.

    COCO's and DETR's layouts come first, then those of common exporters: `train/_annotations.coco.json` next to its
    images, `annotations/train.json` with `images/train/`, `train/` or `images/`.

    Raises:
        InputError: if there is no such file or folder; names the flags, and what was found instead.
    """
    if annotations is None:
        file = next((path for path in annotation_files(root, split) if path.is_file()), None)
        if file is None and split == "test":
            raise InputError(f"--coco_path {root}: no annotations/{TEST_DEV}; {describe_json(root)}")
        if file is None:
            raise InputError(
                f"--coco_path {root}: no annotations of the {split} images; {describe_json(root)}; "
                f"name the file by --{split}_annotations and its images by --{split}_images"
            )
    else:
        file = Path(annotations)
    if images is not None:
        return file, Path(images)
    folders = list(image_folders(root, split, file.parent))
    existing = (folder for folder in folders if folder.is_dir())
    folder = next(filter(holds_files, folders), None) or next(existing, None)
    if folder is None:
        advice = "; add test2017/" if split == "test" else f"; name it by --{split}_images"
        raise InputError(f"--coco_path {root}: no folder of the {split} images{advice}")
    return file, folder


def annotation_files(root: Path, split: str) -> Iterator[Path]:
    """Yield the places of a split's annotation file, the most common ones first, each also compressed."""
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


def image_folders(root: Path, split: str, near: Path) -> Iterator[Path]:
    """Yield the places of a split's images, the most common ones first; `near` is the annotation file's folder."""
    yield from (root / "images" / f"{split}2017", root / f"{split}2017")
    for name in ALIASES[split]:
        yield from (root / "images" / name, root / name / "images", root / name)
    yield from (near, root / "images", root)


def holds_files(folder: Path) -> bool:
    """Return whether a folder has a file that is no JSON."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_file() and not entry.name.endswith((".json", ".gz")) for entry in entries)
    except OSError:
        return False


def describe_json(root: Path) -> str:
    """Return which JSON files a folder holds, as part of a line."""
    paths = (path for pattern in ("*.json*", "*/*.json*", "*/*/*.json*") for path in sorted(root.glob(pattern)))
    found = [str(path.relative_to(root)) for path in islice(paths, MOST_NAMED)]
    return f"it holds {', '.join(found)}" if found else "it holds no JSON file"
