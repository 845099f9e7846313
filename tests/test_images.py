"""Reading image files: the pixels are those that a viewer shows; files that cannot be used end in one line."""

import io
import json
import os
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets.coco import CocoDetection
from datasets.images import image_size, read_image, summarize_notes
from datasets.shapes import draw_scene
from tests.test_bad_annotations import VAL
from tests.test_deep_images import png_chunk
from util.errors import InputError

ORIENTATION = 0x0112
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def scene(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return draw_scene(random.Random(1))[0].resize(size)


def stored(path: Path, image: Image.Image, kind: str | None = None, **options) -> Path:
    image.save(path, kind, **options)
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        read_image(path, **options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def test_one_module_opens_image_files():
    """The exceptions are an example that stands alone, and the benchmark that compares with Pillow."""
    root = Path(__file__).parent.parent
    files = [path for path in root.glob("[!.]*/**/*.py") if path.parts[-2] != "tests"]
    users = {
        path.name for path in files if re.search(r"Image\.(open|OPEN)|decode_jpeg\(|ImageFile\.", path.read_text())
    }
    assert users == {"images.py", "onnx_example.py", "data.py"}


def test_errors_use_the_given_name_of_a_file(tmp_path):
    for read in (read_image, image_size):
        with pytest.raises(InputError, match=r"^photo 3: cannot be read \(No such file or directory\)$"):
            read(tmp_path / "a.jpg", name="photo 3")


def test_no_format_runs_another_program(tmp_path, monkeypatch):
    """Pillow passes PostScript to Ghostscript, whatever the name of the file."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    assert refusal(tmp_path / "a.jpg").startswith("cannot be decoded (not an image, or not in one of the formats JPEG,")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "XBM", "PDF"])
def test_other_formats_are_refused(kind, tmp_path):
    image = scene().convert("1") if kind == "XBM" else scene()
    assert "not an image" in refusal(stored(tmp_path / "a.jpg", image, kind))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_are_recognised_by_their_contents(kind, tmp_path):
    image = scene().quantize(32) if kind == "GIF" else scene()
    path = stored(tmp_path / "a.jpg", image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert torch.equal(read_image(path).pixels, pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_of_tiff_is_read(mode, tmp_path):
    if mode == "PA":
        image = scene().quantize(16).convert("PA")
    elif mode == "I;16":
        image = scene().convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    else:
        image = scene().convert(mode)
    expected = scene().convert("L") if mode == "I;16" else image
    read = read_image(stored(tmp_path / "a.tif", image)).pixels
    assert torch.equal(read, pil_to_tensor(expected.convert("RGB")))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_images_of_few_bits_range_from_black_to_white(bits, tmp_path):
    top = 2**bits - 1
    row = bytes([sum(value << (8 - bits * (i + 1)) for i, value in enumerate([0, top] * (4 // bits) or [0, top]))])
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert read_image(tmp_path / "a.png").pixels[:, 0].tolist() == [[0, 255]] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_images_are_turned_as_exif_says(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = stored(tmp_path / "a", scene(), kind, exif=exif)
    with Image.open(path) as file:
        expected = ImageOps.exif_transpose(file.convert("RGB"))
    picture = read_image(path, upright=True)
    assert torch.equal(picture.pixels, pil_to_tensor(expected))
    assert picture.size == expected.size == image_size(path, upright=True)
    assert picture.pixels[None].is_contiguous(memory_format=torch.channels_last)
    assert read_image(path).size == image_size(path) == (64, 48)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_of_several_frames_is_read(kind, tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = stored(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:], **options)
    picture = read_image(path)
    assert torch.equal(picture.pixels, pil_to_tensor(frames[0]))
    assert picture.notes == ["several frames, of which the first is used"]


def test_files_with_two_images_of_a_camera_need_no_note(tmp_path):
    """The second image of an MPO file is the view of the other eye, or a preview."""
    path = stored(tmp_path / "a.jpg", scene(), "MPO", save_all=True, append_images=[scene().rotate(90)])
    single = stored(tmp_path / "single.jpg", scene(), "JPEG")
    assert torch.equal(read_image(path).pixels, read_image(single).pixels)
    assert read_image(path).notes == []


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"Comment\0" + b"a" * 70_000_000),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000))),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_long_texts_in_png_files_are_skipped(chunk, place, tmp_path):
    encoded = stored(tmp_path / "a.png", scene()).read_bytes()
    at = encoded.index(b"IDAT" if place == "before the pixels" else b"IEND") - 4
    (tmp_path / "a.png").write_bytes(encoded[:at] + png_chunk(*chunk) + encoded[at:])
    assert torch.equal(read_image(tmp_path / "a.png").pixels, pil_to_tensor(scene()))


class TestLimit:
    """The limit of megapixels, which is 1 here."""

    @pytest.mark.parametrize(("kind", "size"), [("PNG", (60_000, 60_000)), ("TIFF", (1001, 1000))])
    def test_larger_images_are_refused(self, kind, size, tmp_path):
        """Only the header is read, which may claim any size."""
        file = io.BytesIO()
        Image.new("1", (8, 8) if kind == "PNG" else size).save(file, kind)
        encoded = file.getvalue()
        if kind == "PNG":
            header = b"".join(side.to_bytes(4, "big") for side in size) + encoded[24:29]
            encoded = encoded[:8] + png_chunk(b"IHDR", header) + encoded[33:]
        (tmp_path / "a").write_bytes(encoded)
        width, height = (f"{side:,}" for side in size)
        assert refusal(tmp_path / "a", max_megapixels=1) == (
            f"has {width}×{height} pixels, more than 1 megapixel: store it smaller, or raise --max_megapixels"
        )

    def test_images_of_exactly_this_size_are_decoded(self, tmp_path):
        path = stored(tmp_path / "a.png", Image.new("1", (1000, 1000)))
        assert read_image(path, max_megapixels=1).pixels.shape == (3, 1000, 1000)

    @pytest.mark.parametrize(("size", "reduction"), [((1500, 1000), 2), ((3001, 2000), 4), ((6000, 4001), 8)])
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_large_jpegs_are_decoded_at_a_reduced_size(self, mode, size, reduction, tmp_path):
        image = scene(size).convert(mode)
        picture = read_image(stored(tmp_path / "a.jpg", image, quality=95), max_megapixels=1)
        assert picture.size == size
        assert picture.decoded_size == tuple(-(-side // reduction) for side in size)
        assert picture.notes == [f"more than 1 megapixel, decoded at 1/{reduction} of its size"]
        small = image.convert("RGB").resize(picture.decoded_size, Image.Resampling.BOX)
        assert (picture.pixels.float() - pil_to_tensor(small)).abs().mean() < 3

    def test_reduced_photos_are_turned_too(self, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        path = stored(tmp_path / "a.jpg", scene((1500, 1000)), exif=exif)
        picture = read_image(path, upright=True, max_megapixels=1)
        assert (picture.size, picture.decoded_size) == ((1000, 1500), (500, 750))

    @pytest.mark.parametrize("storage", ["progressive", "channel by channel", "too large for an eighth"])
    def test_jpegs_that_cannot_be_reduced_are_refused(self, storage, tmp_path):
        """JPEGs of several scans need the memory of all pixels at any reduction."""
        size = (9000, 8000) if storage == "too large for an eighth" else (1500, 1000)
        path = stored(tmp_path / "a.jpg", Image.new("RGB", size), progressive=storage == "progressive")
        if storage == "channel by channel":
            encoded = bytearray(path.read_bytes())
            encoded[encoded.index(b"\xff\xda") + 4] = 1  # channels in the first scan
            path.write_bytes(encoded)
        assert "more than 1 megapixel" in refusal(path, max_megapixels=1)

    def test_boxes_follow_a_reduced_image(self, tmp_path):
        """Training and evaluation get the same targets as from an image that is decoded in full."""
        stored(tmp_path / "a.jpg", scene((1601, 1000)), quality=95)
        box = {"image_id": 1, "category_id": 1, "bbox": [801, 100, 400, 300], "area": 120_000}
        data = {"images": [{"id": 1, "file_name": "a.jpg", "width": 1601, "height": 1000}], "annotations": [box]}
        (tmp_path / "a.json").write_text(json.dumps(data | {"categories": [{"id": 1}]}))
        whole, reduced = (
            CocoDetection(tmp_path, tmp_path / "a.json", VAL, max_megapixels=limit)[0] for limit in (2, 1)
        )
        assert reduced[0].shape == whole[0].shape
        for key, value in whole[1].items():
            torch.testing.assert_close(reduced[1][key], value, rtol=2e-3, atol=0)
        assert reduced[1]["orig_size"].tolist() == [1000, 1601]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (lambda path: path.mkdir(), "cannot be read (not a regular file)"),
        (os.mkfifo, "cannot be read (not a regular file)"),
        (lambda path: path.touch(), "cannot be decoded (not an image, or not in one"),
        (lambda path: path.write_bytes(b"P"), "cannot be decoded (not an image, or not in one"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"), "cannot be decoded (a damaged JPEG file)"),
    ],
    ids=["missing", "folder", "pipe", "empty", "one byte", "the first bytes of a JPEG"],
)
def test_files_that_are_no_images_are_named_in_one_line(make, message, tmp_path):
    make(tmp_path / "a.jpg")
    assert refusal(tmp_path / "a.jpg").startswith(message)


def test_notes_are_summarized():
    notes = [("a", ["x"]), ("b", []), *((name, ["y"]) for name in "cdef")]
    assert list(summarize_notes(notes)) == ["1 image: x (a)", "4 images: y (c, d, e, ..)"]
