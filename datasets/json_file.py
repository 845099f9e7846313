"""Reading of JSON annotation files, and checks that they are COCO instance files."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from util.errors import InputError, reason

GZIP = b"\x1f\x8b"


def read_json(path: Path, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """Return the contents of a JSON file: UTF-8, 16 or 32, with or without a byte-order mark; gzip is allowed.

    Args:
        object_hook: as for `json.loads`, called with each object as soon as it is read.

    Raises:
        InputError: if the file is missing or is not JSON.
    """
    try:
        contents = path.read_bytes()
        if contents.startswith(GZIP):
            contents = gzip.decompress(contents)
        with _without_collector():
            return json.loads(contents, object_hook=object_hook)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such annotation file") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not a gzip file, or a damaged one ({reason(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, absurd nesting
        raise InputError(f"{path}: not JSON ({reason(error)})") from error


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector, which would scan millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_kind(data: Any, path: Path) -> None:
    """Raise InputError if the data is not a COCO instance file; the message says what it seems to be."""
    if kind := other_kind(data):
        raise InputError(f"{path}: {kind}; name a COCO instance file")
    if isinstance(data, dict) and data.get("images") and data.get("annotations") is None:
        raise InputError(
            f"{path}: lists images without annotations, like COCO's image_info files, which are only for "
            "--eval --image_set test; name a COCO instance file"
        )
    check_lists(data, path, "instance")


def check_lists(data: Any, path: Path, kind: str) -> None:
    """Raise InputError if the data lacks one of the lists of COCO's instance and panoptic files."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise InputError(f"{path}: not a COCO {kind} file: it has no list {key!r}")


def other_kind(data: Any) -> str:
    """Describe a file in another well-known format; return "" for all other files."""
    if isinstance(data, list):
        return "a list of detections, as in COCO's result files" if "score" in _first(data) else ""
    if not isinstance(data, dict):
        return ""
    image, annotation, category = (_first(data.get(key)) for key in ("images", "annotations", "categories"))
    if "segments_info" in annotation:
        return "a panoptic file, in which an annotation lists all segments of an image"
    if "neg_category_ids" in image or "not_exhaustive_category_ids" in image or "synset" in category:
        return "an LVIS file, whose images are not annotated with all classes and have no 'file_name'"
    if isinstance(data.get("videos"), list):
        return "a file of videos, whose annotations are tracks"
    if "caption" in annotation:
        return "a file of captions"
    if "shapes" in data and "imagePath" in data:
        return "labelme's file of a single image: convert all of them to one COCO file"
    if "_via_img_metadata" in data:
        return "a project of the VGG image annotator: export it as COCO"
    return ""


def _first(entries: Any) -> dict[str, Any]:
    """Return the first entry of a list if it is a JSON object, else an empty dict."""
    return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
