"""Images with more than 8 bits per channel: one image, stored in many formats, is always read the same."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from datasets import depth
from datasets.images import read_image
from util.errors import InputError

MAX_SAMPLE_VALUE = 281  # a TIFF tag


def ramp(low: float = 0.48, high: float = 0.87) -> np.ndarray:
    """Return an image of greys, [48, 64], as fractions of white; by default, none is black or white."""
    return np.linspace(low, high, 48 * 64).reshape(48, 64)


def greys(path: Path, values: np.ndarray, tags: dict[int, int] | None = None) -> Path:
    """Write an image of greys in the mode that fits the array's type, with TIFF tags if any are given."""
    options = {}
    if tags:
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"].update(tags)
    Image.fromarray(values).save(path, **options)
    return path


def colour_png(path: Path, values: np.ndarray) -> Path:
    """Write a PNG file of 16 bits per channel, [H, W, 2 to 4], which Pillow cannot write."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2").reshape(height, -1))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def colour_tiff(path: Path, values: np.ndarray, order: str) -> Path:
    """Write an uncompressed TIFF file of 16 bits per channel, [H, W, 3], which Pillow cannot write."""
    height, width, _ = values.shape
    tags = ((256, width), (257, height), (259, 1), (262, 2), (277, 3), (278, height), (279, values.size * 2))
    entries = [(number, 4, 1, struct.pack(order + "I", value)) for number, value in tags]
    bits_at = 8 + 2 + 12 * 9 + 4
    entries += [(258, 3, 3, struct.pack(order + "I", bits_at)), (273, 4, 1, struct.pack(order + "I", bits_at + 6))]
    directory = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    bits = struct.pack(order + "3H", 16, 16, 16)
    path.write_bytes(start + directory + bytes(4) + bits + values.astype(order + "u2").tobytes())
    return path


def scaled(white: float, kind: str) -> np.ndarray:
    values = ramp() * white
    return values.astype(kind) if kind == "f4" else np.round(values).astype(kind)


def holes() -> np.ndarray:
    """Return floats, three of which are not finite; a few such pixels are ignored."""
    values = scaled(1, "f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    return values


def pgm(path: Path, values: np.ndarray, maximum: int) -> Path:
    header = f"P5 {values.shape[1]} {values.shape[0]} {maximum}\n"
    path.write_bytes(header.encode() + values.astype(">u2").tobytes())
    return path


def channels(white: int, number: int) -> np.ndarray:
    return scaled(white, "u2")[..., None].repeat(number, 2)


DEEP = {
    "8 of 16 bits": lambda path: greys(path / "a.png", scaled(255, "u2")),
    "10 of 16 bits": lambda path: greys(path / "a.png", scaled(1023, "u2")),
    "12 of 16 bits": lambda path: greys(path / "a.png", scaled(4095, "u2")),
    "12 of 16 bits, TIFF": lambda path: greys(path / "a.tif", scaled(4095, "u2")),
    "12 of 16 bits, big-endian TIFF": lambda path: greys(path / "a.tif", scaled(4095, ">u2")),
    "14 of 16 bits": lambda path: greys(path / "a.png", scaled(16383, "u2")),
    "16 bits": lambda path: greys(path / "a.png", scaled(65535, "u2")),
    "12 of 32 bits": lambda path: greys(path / "a.tif", scaled(4095, "i4")),
    "31 of 32 bits": lambda path: greys(path / "a.tif", scaled(2**31 - 1, "i4")),
    "floats up to 1": lambda path: greys(path / "a.tif", scaled(1, "f4")),
    "floats up to 255": lambda path: greys(path / "a.tif", scaled(255, "f4")),
    "floats up to 65535": lambda path: greys(path / "a.tif", scaled(65535, "f4")),
    "floats, not all finite": lambda path: greys(path / "a.tif", holes()),
    "floats, PFM": lambda path: greys(path / "a.pfm", scaled(1, "f4")),
    "16 bits, white is zero": lambda path: greys(path / "a.tif", 65535 - scaled(65535, "u2"), {262: 0}),
    "16-bit colours": lambda path: colour_png(path / "a.png", channels(65535, 3)),
    "12 of 16 bits, colours": lambda path: colour_png(path / "a.png", channels(4095, 3)),
    "12 of 16 bits, RGBA": lambda path: colour_png(path / "a.png", channels(4095, 4)),
    "12 of 16 bits, LA": lambda path: colour_png(path / "a.png", channels(4095, 2)),
    "12 of 16 bits, TIFF colours": lambda path: colour_tiff(path / "a.tif", channels(4095, 3), "<"),
    "12 of 16 bits, big-endian TIFF colours": lambda path: colour_tiff(path / "a.tif", channels(4095, 3), ">"),
    "PGM of 12 bits": lambda path: pgm(path / "a.pgm", scaled(4095, "u2"), 4095),
}


@pytest.mark.parametrize("kind", DEEP)
def test_every_format_is_read_as_the_same_image(kind, tmp_path):
    pixels = read_image(DEEP[kind](tmp_path)).pixels
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 48, 64)
    expected = torch.from_numpy(ramp() * 255).expand(3, -1, -1)
    difference = (pixels - expected).abs()
    assert difference[:, 1:].max() <= 1.01
    assert difference.mean() < 2


def assert_greys(path: Path, fractions: np.ndarray, tolerance: float = 1.01) -> None:
    """Check that a file is read as greys that are these fractions of white."""
    pixels = read_image(path).pixels
    expected = torch.from_numpy(fractions * 255).expand(3, -1, -1)
    assert (pixels - expected).abs().max() <= tolerance


def test_dark_images_stay_dark(tmp_path):
    """The largest value, 0.3 of 65,535, needs more than 14 bits, so that the image is read as 16 bits."""
    dark = (ramp(0, 0.3) * 65535).astype("u2")
    assert_greys(greys(tmp_path / "a.png", dark), ramp(0, 0.3))
    assert read_image(tmp_path / "a.png").notes == []
    colours = dark[..., None].repeat(3, 2)
    assert_greys(colour_png(tmp_path / "a.png", colours), ramp(0, 0.3))
    assert_greys(greys(tmp_path / "a.png", np.zeros((48, 64), "u2")), np.zeros((48, 64)))
    assert read_image(tmp_path / "a.png").notes == []


@pytest.mark.parametrize(("maximum", "white"), [(65535, 65535), (4095, 4095), (0, 1023), (800, 1023), (16383, 1023)])
def test_the_maximum_that_a_tiff_declares_is_white(maximum, white, tmp_path):
    """It is used if the values agree with it: none is larger, and not all of them look black."""
    values = (ramp(0, 0.1) * 65535).astype("u2") if maximum == 65535 else (ramp(0, 0.9) * 1000).astype("u2")
    path = greys(tmp_path / "a.tif", values, {MAX_SAMPLE_VALUE: maximum})
    assert_greys(path, values / white)


@pytest.mark.parametrize(
    "values",
    [
        (ramp(-1, 3) * 1000).astype("i4"),
        (ramp(1, 1.1) * 1e6).astype("i4"),
        (ramp(0, 1) * 1e-4).astype("f4"),
        (ramp(0, 1) * 7).astype("f4"),
        (ramp(-1, 1) * 1e38).astype("f4"),
        (ramp(0, 1) * 9).astype("u2"),
    ],
    ids=["negative", "far from 0", "tiny", "between the maxima", "huge", "labels"],
)
def test_other_ranges_are_stretched_from_black_to_white(values, tmp_path):
    path = greys(tmp_path / "a.tif", values)
    values = values.astype(float)
    assert_greys(path, (values - values.min()) / (values.max() - values.min()))
    assert read_image(path).notes == [
        "more than 8 bits per channel; the lowest value is taken as black, the highest as white"
    ]


def test_floats_a_little_beyond_black_and_white_are_clipped(tmp_path):
    assert_greys(greys(tmp_path / "a.tif", ramp(-0.05, 1.05).astype("f4")), ramp(-0.05, 1.05).clip(0, 1))


def test_guesses_are_noted(tmp_path):
    note = "more than 8 bits per channel; 4,095 is taken as white"
    assert read_image(greys(tmp_path / "a.png", scaled(4095, "u2"))).notes == [note]
    assert read_image(greys(tmp_path / "a.tif", scaled(1, "f4"))).notes == []


def test_images_without_finite_values_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a.tif: cannot be decoded \(it holds no finite value\)$"):
        read_image(greys(tmp_path / "a.tif", np.full((3, 4), np.nan, "f4")))


def test_images_that_are_converted_in_bands_are_the_same(tmp_path, monkeypatch):
    """Convert a few rows at a time, as for large images."""
    for kind in ("12 of 16 bits", "12 of 16 bits, colours", "floats, not all finite"):
        path = DEEP[kind](tmp_path)
        whole = read_image(path).pixels
        with monkeypatch.context() as patch:
            patch.setattr(depth, "BAND", 100)
            assert torch.equal(read_image(path).pixels, whole)
