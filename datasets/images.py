"""Reading of image files as uint8 tensors: the one place that opens, checks and decodes images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from datasets.depth import to_rgb8
from util.errors import InputError, reason
from util.text import counted

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # some others make Pillow run other programs
MAX_MEGAPIXELS = 100
JPEG_REDUCTIONS = (2, 4, 8)  # divisors of the sides: JPEG stores blocks of 8 × 8 pixels

EXIF_ORIENTATION = 0x0112
EXIF_QUARTER_TURNS = (5, 6, 7, 8)  # rows become columns, and then the axes below are flipped
EXIF_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PNG_XMP = b"XML:com.adobe.xmp\0\0"  # keyword and flag of uncompressed XMP

MOST_NAMES = 3  # of images in a line


@dataclass
class Picture:
    """A decoded image file.

    Attributes:
        pixels: uint8 [3, H, W], with the channels last in memory.
        size: (width, height) of the file, which `pixels` also have, unless a large JPEG was decoded at a reduced size.
        notes: lines for the user about how the file was decoded; usually empty.
    """

    pixels: Tensor
    size: tuple[int, int]
    notes: list[str]

    @property
    def decoded_size(self) -> tuple[int, int]:
        """Width and height of `pixels`."""
        return self.pixels.shape[2], self.pixels.shape[1]


def read_image(path: Path, upright: bool = False, max_megapixels: int = MAX_MEGAPIXELS, name: object = None) -> Picture:
    """Decode an image file: the first of several frames, with values scaled to 8 bits (`datasets.depth`).

    JPEGs of more than `max_megapixels` are decoded at a half, a quarter or an eighth of their size.

    Args:
        upright: apply the file's EXIF orientation, as photo viewers do; else keep the image as stored.
        name: the file's name in errors, by default its path.

    Raises:
        InputError: if the file is missing, damaged, too large, or in none of `FORMATS`.
    """
    with _errors_that_name(name or path), contextlib.ExitStack() as files:
        image, file = _open(path, files)
        notes = []
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("several frames, of which the first is used")
        size, orientation = image.size, _orientation(image) if upright else 1
        if reduction := _reduction(image, file, max_megapixels):
            width, height = (max(side // reduction, 1) for side in size)
            image.draft(None, (width, height))
            notes.append(f"more than {counted(max_megapixels, 'megapixel')}, decoded at 1/{reduction} of its size")
        rgb = None if reduction else _decode_jpeg(image, file)
        if rgb is None:
            rgb, note = to_rgb8(image, lambda: _open(path, files)[0])
            notes += [note] if note else []
    pixels = torch.from_numpy(_turn(rgb, orientation)).permute(2, 0, 1)
    return Picture(pixels, _turned_size(size, orientation), notes)


def image_size(path: Path, upright: bool = False, name: object = None) -> tuple[int, int]:
    """Return the (width, height) of an image file from its header; see `read_image` for arguments and errors."""
    with _errors_that_name(name or path), contextlib.ExitStack() as files:
        image, _ = _open(path, files)
        return _turned_size(image.size, _orientation(image) if upright else 1)


def summarize_notes(notes: Iterable[tuple[str, Iterable[str]]]) -> Iterator[str]:
    """Yield a line for each distinct note, with the number of images that have it and some of their names.

    Args:
        notes: the name and the notes of each image.
    """
    names: dict[str, list[str]] = {}
    for name, of_image in notes:
        for note in of_image:
            names.setdefault(note, []).append(name)
    for note, having in names.items():
        some = ", ".join(having[:MOST_NAMES]) + (", .." if len(having) > MOST_NAMES else "")
        yield f"{counted(len(having), 'image')}: {note} ({some})"


@contextlib.contextmanager
def _errors_that_name(name: object) -> Iterator[None]:
    """Convert every exception within the block to an InputError that begins with the name of the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise many types on damaged files
        if strerror := getattr(error, "strerror", None):
            raise InputError(f"{name}: cannot be read ({strerror})") from error
        raise InputError(f"{name}: cannot be decoded ({reason(error)})") from error


def _open(path: Path, files: contextlib.ExitStack) -> tuple[ImageFile, BinaryIO]:
    """Return the image of a file and the file itself, which `files` closes."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise InputError("cannot be read (not a regular file)")
    file = files.enter_context(path.open("rb"))
    return _identify(file), file


def _identify(file: BinaryIO) -> ImageFile:
    """Return the image of an open file; `Image.open` would refuse large JPEGs, which can be decoded smaller."""
    start = file.read(16).ljust(16)
    for load_plugins in (Image.preinit, Image.init):  # the common plugins first: they load faster
        load_plugins()
        for name in FORMATS:
            factory, accepts = Image.OPEN.get(name, (None, None))
            # A string means that this Pillow lacks the format's library.
            if factory and accepts and accepts(start) is True:
                file.seek(0)
                try:
                    return factory(_without_texts(file) if name == "PNG" else file, "")
                except SyntaxError as error:  # Pillow's error for a bad header
                    raise InputError(f"cannot be decoded (a damaged {name} file)") from error
    raise InputError(f"cannot be decoded (not an image, or not in one of the formats {', '.join(FORMATS)})")


def _without_texts(file: BinaryIO) -> BinaryIO:
    """Return a PNG file without its texts and colour profile: Pillow refuses long ones, and they are not used here.

    Uncompressed XMP data stays, since it may contain the orientation.
    """
    size, start, kept = file.seek(0, io.SEEK_END), len(PNG_SIGNATURE), [slice(0, len(PNG_SIGNATURE))]
    while start < size:
        file.seek(start)
        header = file.read(8 + len(PNG_XMP))  # length, kind, and the beginning of the contents
        end, kind = start + 12 + int.from_bytes(header[:4], "big"), header[4:8]
        if kind not in PNG_TEXTS or header[8:] == PNG_XMP:
            kept.append(slice(start, end))
        start = end
    file.seek(0)
    if sum(part.stop - part.start for part in kept) == start:
        return file
    contents = file.read()
    return io.BytesIO(b"".join(contents[part] for part in kept))


def _reduction(image: Image.Image, file: BinaryIO, max_megapixels: int) -> int:
    """Return 0 for an image of at most `max_megapixels`, or the divisor of the sides of a larger JPEG.

    Only JPEGs with a single scan need less memory when they are decoded at a reduced size.
    """
    width, height = image.size
    if width * height <= max_megapixels * 1e6:
        return 0
    for reduction in JPEG_REDUCTIONS if _has_one_scan(image, file) else ():
        if -(-width // reduction) * -(-height // reduction) <= max_megapixels * 1e6:
            return reduction
    raise InputError(
        f"has {width:,}×{height:,} pixels, more than {counted(max_megapixels, 'megapixel')}: "
        "store it smaller, or raise --max_megapixels"
    )


def _has_one_scan(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether a file is a JPEG whose first scan holds all channels of all pixels."""
    if not isinstance(image, JpegImageFile) or "progressive" in image.info:
        return False
    length = 6 + 2 * image.layers  # of the scan's header, at whose end Pillow stopped reading
    file.seek(-2 - length, io.SEEK_CUR)
    return file.read(5) == b"\xff\xda" + length.to_bytes(2, "big") + bytes([image.layers])


def _decode_jpeg(image: Image.Image, file: BinaryIO) -> np.ndarray | None:
    """Return the pixels [H, W, 3] of a JPEG, decoded faster than by Pillow; None if Pillow has to decode the file.

    These are other formats, JPEGs of four channels, and damaged files, for which Pillow has better error messages.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    file.seek(0)
    encoded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    try:
        return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except RuntimeError:
        return None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (as stored) if there is none, and for TIFFs, which Pillow turns itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(EXIF_ORIENTATION, 1)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [H, W, 3] according to an EXIF orientation."""
    if orientation in EXIF_QUARTER_TURNS:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(np.flip(pixels, EXIF_FLIPS.get(orientation, ())))


def _turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the (width, height) after `_turn`."""
    return size[::-1] if orientation in EXIF_QUARTER_TURNS else size
