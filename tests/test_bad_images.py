"""Image files of any mode and with any damage: a usable sample, a skipped image, or an error that names the file."""

import io
import json
import random
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets import build_dataset, build_loader
from datasets import transforms as T
from datasets.coco import CocoDetection
from datasets.images import read_image
from datasets.records import Records
from engine import report_skipped
from tests.conftest import TINY
from tests.test_bad_annotations import TRAIN, VAL, assert_usable, write
from tests.test_transforms import blank, whole_image
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")

MODES = {"JPEG": ("L", "RGB", "CMYK"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}


def encode(image: Image.Image, kind: str = "PNG", orientation: int | None = None, **options) -> bytes:
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if image.mode == "P":
        options["transparency"] = bytes(range(256))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    """Return a picture of random pixels, the same at every call."""
    data = random.Random(0).randbytes(3 * size[0] * size[1])
    picture = Image.frombytes("RGB", size, data)
    if mode == "I;16":
        return picture.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    return picture.convert(mode)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A COCO folder, in which `build` writes files."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    for name in ("2.png", "3.png"):
        (root / "val2017" / name).write_bytes(encode(noise("RGB", (30, 20))))
    return root


@pytest.fixture(scope="module")
def build(root):
    """Return a function that makes a data set of three images, the first of which is the given file.

    `size` is (width, height) of this image according to the annotations.
    """

    def build(first: bytes | None, size=None, name="1.jpg", transforms=VAL, on_bad_image="error") -> CocoDetection:
        images = [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in (2, 3)]
        images.append(
            {"id": 1, "file_name": name} | (dict(zip(("width", "height"), size, strict=True)) if size else {})
        )
        box = {"bbox": [0, 0, 30, 10], "category_id": 1}
        data = {"images": images, "categories": [{"id": 1}], "annotations": [box | {"image_id": i} for i in (1, 2, 3)]}
        path = root / "annotations" / "instances_val2017.json"
        write(path, json.dumps(data).encode())
        if first is None:
            (root / "val2017" / name).unlink(missing_ok=True)
        else:
            write(root / "val2017" / name, first)
        return CocoDetection(root / "val2017", path, transforms, on_bad_image=on_bad_image)

    return build


@st.composite
def damaged(draw) -> tuple[bytes, tuple[int, int]]:
    """Draw a small image file that is cut off, has wrong bytes, or is intact, and the size of its image."""
    kind = draw(st.sampled_from(sorted(MODES)))
    sides = st.one_of(st.just(1), st.integers(1, 60))
    size = draw(sides), draw(sides)
    image = noise(draw(st.sampled_from(MODES[kind])), size)
    progressive = {"progressive": True} if kind == "JPEG" and draw(st.booleans()) else {}
    file = bytearray(encode(image, kind, draw(st.sampled_from([None, 3, 6, 8])), **progressive))
    damage = draw(st.sampled_from(["none", "cut", "bytes", "header"]))
    if damage == "cut":
        del file[draw(st.integers(0, len(file) - 1)) :]
    elif damage != "none":
        end = min(len(file), 64 if damage == "header" else len(file)) - 1
        for place, value in draw(st.lists(st.tuples(st.integers(0, end), st.integers(0, 255)), min_size=1, max_size=8)):
            file[place] = value
    return bytes(file), size


def check(build, file: bytes, size: tuple[int, int], known: bool, name: str) -> None:
    """Do all that a run does with an image file; if `known`, its size is in the annotations."""
    for transforms in (VAL, TRAIN):
        dataset = build(file, size if known else None, name, transforms)
        neighbour = dataset[1]
        try:
            image, target = dataset[0]
        except InputError as error:
            assert "\n" not in str(error)
            assert f"{name} (image id 1): " in str(error)
            skipping = build(file, size if known else None, name, transforms, "skip")
            image, target = skipping[0]
            assert torch.equal(image, neighbour[0])
            assert skipping.take_skipped() == [0]
            assert target["image_id"] == 2
        else:
            assert_usable(dataset, image, target)
            assert dataset.take_skipped() == []
            assert len(target["boxes"]) == 1 or transforms is TRAIN  # a crop may miss the object


files = {"damage": damaged(), "known": st.booleans(), "name": st.sampled_from(["1.jpg", "1.png", "1"])}


@settings(max_examples=250)
@given(**files)
def test_damaged_files(damage, known, name, build):
    check(build, *damage, known, name)


@pytest.mark.slow
@settings(max_examples=4000)
@given(**files)
def test_many_damaged_files(damage, known, name, build):
    check(build, *damage, known, name)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(kind, mode, build):
    """Colours are those of Pillow's conversion; transparent pixels keep their colour."""
    image = noise(mode, (30, 20))
    exact = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    loaded = build(encode(image, kind, **exact), (30, 20)).load_image(0).pixels
    assert loaded.shape == (3, 20, 30)
    expected = image.convert("I").point(lambda value: value / 257 + 0.5) if mode == "I;16" else image
    difference = loaded.float() - pil_to_tensor(expected.convert("RGB")).float()
    assert difference.abs().mean() < (2 if kind == "JPEG" else 1e-6)


@settings(max_examples=150)
@given(damage=damaged())
def test_the_fast_decoder_agrees_with_pil(damage, root):
    """Both decode the same pixels, and refuse the same damaged files."""
    write(root / "any", damage[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(root / "any") as file:
                deep = file.mode == "I;16"
                expected = pil_to_tensor(file.convert("RGB"))
        except Exception:
            with pytest.raises(InputError, match="cannot be decoded"):
                read_image(root / "any")
        else:
            assert deep or torch.equal(read_image(root / "any").pixels, expected)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_for_the_rotated_image(orientation, build):
    dataset = build(encode(noise("RGB", (40, 30)), "JPEG", orientation), (30, 40))
    with pytest.raises(InputError, match=r"1.jpg \(image id 1\): is 40×30, but .* says 30×40, its size once"):
        dataset[0]


@pytest.mark.parametrize(("orientation", "size"), [(None, (30, 40)), (3, (30, 40)), (6, (30, 41))])
def test_other_sizes_are_not_blamed_on_exif(orientation, size, build):
    with pytest.raises(InputError, match=r"says 30×4[01]; pass --on_bad_image skip to continue without such images$"):
        build(encode(noise("RGB", (40, 30)), "JPEG", orientation), size)[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (10, 20_000), (20_000, 400)])
def test_extreme_shapes_stay_small(size, monkeypatch):
    """However long and thin an image is, the model's input has sides of about `max_size` at most.

    Images in between are limited, too.
    """
    made = []
    resize = T.F.resize
    monkeypatch.setattr(T.F, "resize", lambda image, shape, *rest: made.append(shape) or resize(image, shape, *rest))
    picture, target = blank(*size), whole_image(*size)
    for split in ("train", "val"):
        for seed in range(16):
            image, result = T.make_coco_transforms(split, 200, 333)(picture, target, random.Random(seed))
            assert result["size"].tolist() == list(image.shape[1:])
            assert (result["boxes"][:, 2:] > result["boxes"][:, :2]).all()
            assert max(image.shape) <= 1.5 * 333
    assert all(min(shape) > 0 and max(shape) <= 1.5 * 10 * 333 for shape in made)


@pytest.mark.parametrize("damage", [b"no image", encode(Image.new("RGB", (9, 9))), None])
def test_skipping(damage, build, capsys):
    """The next image, with its own augmentation, replaces one that is damaged, of another size, or missing."""
    neighbour = build(damage if damage else b"", (30, 20), transforms=TRAIN)[1]
    dataset = build(damage, (30, 20), transforms=TRAIN, on_bad_image="skip")
    printed = capsys.readouterr().out
    assert ("1 of 3 images" in printed and "is missing: 1.jpg; skipped" in printed) == (damage is None)
    samples = list(dataset)
    assert [int(target["image_id"]) for _, target in samples] == [2, 2, 3]
    assert torch.equal(samples[0][0], neighbour[0])
    assert all(target.keys() == neighbour[1].keys() for _, target in samples)  # no keys that a criterion does not know
    assert (dataset.take_skipped(), dataset.take_skipped()) == ([0], [])
    assert dataset.describe_skipped([0]) == "1 image could not be read and was skipped: 1.jpg (image id 1)"


def test_skipping_wraps_around(build):
    dataset = build(encode(noise("RGB", (30, 20))), (30, 20), on_bad_image="skip")
    dataset.records.sizes[1:] = 31
    for start, skipped in ((1, [1, 2]), (2, [2])):
        assert int(dataset[start][1]["image_id"]) == 1
        assert dataset.take_skipped() == skipped
    dataset.records.sizes[:] = 31
    with pytest.raises(
        InputError, match=r"none of 3 images can be used; the last error: .*2.png \(image id 2\): is 30×20"
    ):
        dataset[2]


def test_all_images_missing(build, root, tmp_path):
    build(b"")
    annotations = root / "annotations" / "instances_val2017.json"
    with pytest.raises(InputError, match=r"3 of 3 images .* are missing: 1.jpg, 2.png, 3.png; is it the right folder"):
        CocoDetection(tmp_path, annotations, VAL, on_bad_image="skip")


def test_a_long_list_of_skipped_images_is_cut(build):
    dataset = build(encode(noise("RGB", (30, 20))))
    dataset.records = Records([{"id": i, "file_name": f"{i}.jpg"} for i in range(12)], [], {})
    text = dataset.describe_skipped(range(12))
    assert text.startswith("12 images could not be read and were skipped: 0.jpg (image id 0), 1.jpg (image id 1)")
    assert text.endswith(" 9.jpg (image id 9), ..")


def test_the_flag_on_bad_image(build, root, parse):
    build(b"no image")
    flags = ("--coco_path", root, "--min_size", 24, "--max_size", 40, "--num_workers", 0)
    with pytest.raises(InputError, match=r"1.jpg \(image id 1\): cannot be decoded"):
        build_dataset("val", parse(*flags))[0]
    dataset = build_dataset("val", parse(*flags, "--on_bad_image", "skip"))
    assert int(dataset[0][1]["image_id"]) == 2
    assert dataset.take_skipped() == [0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("overfit", [0, 3])
def test_every_pass_over_a_loader_reports_skipped_images(workers, overfit, build, parse, capsys):
    """Each image is reported once per pass, also by persistent workers, and if images are repeated."""
    dataset = build(b"no image", on_bad_image="skip")
    if overfit:
        dataset.keep_first(overfit, at_least=12)
    loader = build_loader(dataset, parse("--num_workers", workers, "--batch_size", 2), train=False)
    for _ in range(2):
        for _, targets in loader:
            assert all(int(target["image_id"]) in (2, 3) for target in targets)
        report_skipped(loader)
        assert capsys.readouterr().out.count("1 image could not be read and was skipped: 1.jpg (image id 1)\n") == 1
    report_skipped(loader)
    assert capsys.readouterr().out == ""


def test_loaders_of_users_report_nothing(capsys):
    for loader in ([], DataLoader([1, 2])):
        report_skipped(loader)
    assert capsys.readouterr().out == ""


def test_one_line_names_the_skipped_images_of_all_processes(shapes, tmp_path, run_on_two):
    """Images 1 and 2 are read by different processes."""
    broken = tmp_path / "coco"
    shutil.copytree(shapes, broken)
    for image_id in (1, 2):
        (broken / "images" / "val2017" / f"{image_id:06}.jpg").write_bytes(b"no image")
    more = ("--eval", "--batch_size", 1, "--num_workers", 1, "--on_bad_image", "skip")
    runs = run_on_two(*TINY, "--coco_path", broken, "--output_dir", tmp_path / "out", *more)
    assert [run.returncode for run in runs] == [0, 0], runs
    line = "2 images could not be read and were skipped: 000001.jpg (image id 1), 000002.jpg (image id 2)\n"
    assert [run.stdout.count("were skipped") for run in runs] == [run.stdout.count(line) for run in runs] == [1, 0]
