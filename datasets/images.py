"""Reading image files as uint8 tensors."""

from __future__ import annotations

import contextlib

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

EXIF_ORIENTATION = 0x0112
EXIF_QUARTER_TURNS = (5, 6, 7, 8)


def decode(file: Image.Image) -> Tensor:
    """The stored pixels of a file that PIL has opened, as uint8 [3, H, W], in memory with the channels last.

    Opening has checked the header, and the number of pixels that it claims. JPEGs without a fourth channel are decoded
    by torchvision, to the pixels that PIL would return; PIL decodes everything else, and finds the words for what is
    damaged. Other formats gain nothing: PNGs take as long to inflate, and torchvision's decoder prints warnings.

    Raises what PIL raises for files that cannot be decoded.
    """
    if file.format == "JPEG" and file.mode in ("L", "RGB"):
        file.fp.seek(0)
        encoded = torch.frombuffer(bytearray(file.fp.read()), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            return decode_jpeg(encoded, ImageReadMode.RGB)
    return pil_to_tensor(to_rgb(file))


def decode_upright(file: Image.Image) -> Tensor:
    """As `decode`, but turned as the file's EXIF orientation says, which is how photos are shown."""
    if _orientation(file) == 1:
        return decode(file)
    return pil_to_tensor(ImageOps.exif_transpose(to_rgb(file)))


def upright_size(file: Image.Image) -> tuple[int, int]:
    """The (width, height) that `decode_upright` returns, read from the header."""
    return file.size[::-1] if _orientation(file) in EXIF_QUARTER_TURNS else file.size


def _orientation(file: Image.Image) -> int:
    """1 for files to be shown as stored; PIL turns TIFFs by itself."""
    return 1 if file.format == "TIFF" else file.getexif().get(EXIF_ORIENTATION, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode with 8 bits for each of red, green and blue; what is transparent keeps its colour."""
    if image.mode.startswith("I"):  # 16 bits of grey, of which PIL would clip all but the darkest 256 to white
        image = image.convert("I").point(lambda value: value / 257 + 0.5)
    return image.convert("RGB")
