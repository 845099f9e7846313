"""A generated data set in COCO format: coloured shapes on varied backgrounds, for the demo and the tests.

    python -m datasets.shapes --output DIR [--train 2400] [--val 200] [--masks] [--panoptic]

Scenes hold zero to three circles, squares and triangles of varied size, colour and tilt, which may overlap. Every
scene depends only on (seed, split, number), so that the same call makes the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then searches only datasets/ for modules
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import colorsys
import json
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageStat

from flags.limits import check_numbers, check_texts
from util.command import Parser, run_command
from util.errors import InputError

CLASSES = ("circle", "square", "triangle")  # category ids 1, 2, 3
STUFF = ("dark", "light")  # backgrounds of panoptic data, category ids 4, 5
MEAN_LUMA = 115  # of 255; backgrounds below are dark
HUES = (0.0, 0.33, 0.62)  # around red, green and blue: shape and colour both show the class, which is quick to learn
HUE_SPREAD = 0.1
MAX_OBJECTS = 3
EMPTY = 0.04  # share of images without objects
MAX_TILT = 15  # degrees from upright
MAX_OVERLAP = 0.3  # share of the smaller box, so that no object is hidden
SUPERSAMPLING = 3  # shapes are drawn larger and scaled down, for smooth edges

Point = tuple[float, float]


class Scene(NamedTuple):
    """Scene: an image, the (category id, outline) of each object, and the background, one of `STUFF`."""

    image: Image.Image
    objects: list[tuple[int, list[Point]]]
    background: str


def write_dataset(
    output: str | Path,
    num_train: int = 2400,
    num_val: int = 200,
    seed: int = 0,
    masks: bool = True,
    panoptic: bool = False,
) -> None:
    """Write `images/{train,val}2017/` and `annotations/instances_{train,val}2017.json` under `output`.

    Args:
        masks: write the objects' outlines as segmentations.
        panoptic: also write `annotations/panoptic_{train,val}2017.json` and `panoptic_{train,val}2017/`.
    """
    for split, number in (("train", num_train), ("val", num_val)):
        write_split(Path(output), split, number, seed, masks, panoptic)


def write_split(root: Path, split: str, number: int, seed: int, masks: bool, panoptic: bool) -> None:
    """Write one split: `number` JPEG images and their annotations with boxes, areas and polygons."""
    folder = root / "images" / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    segmented: list[dict[str, Any]] = []
    for image_id in range(1, number + 1):
        scene = draw_scene(random.Random(f"{seed} {split} {image_id}"))
        name = f"{image_id:06}.jpg"
        scene.image.save(folder / name, quality=92)
        images.append({"id": image_id, "file_name": name, "width": scene.image.width, "height": scene.image.height})
        for category, polygon in scene.objects:
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            annotations.append(entry | polygon_fields(polygon, masks))
        if panoptic:
            segmented.append({"image_id": image_id} | write_segments(root / f"panoptic_{split}2017", image_id, scene))
    things: list[dict[str, Any]] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    write_json(root, f"instances_{split}2017", images, annotations, things)
    if panoptic:
        stuff = [{"id": i, "name": name, "isthing": 0} for i, name in enumerate(STUFF, start=len(CLASSES) + 1)]
        categories = [entry | {"isthing": 1} for entry in things] + stuff
        write_json(root, f"panoptic_{split}2017", images, segmented, categories)


def write_json(root: Path, name: str, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    """Write an annotation file in COCO's format."""
    path = root / "annotations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_segments(folder: Path, image_id: int, scene: Scene) -> dict[str, Any]:
    """Write the PNG file of a scene's segments, and return their description in COCO's panoptic format."""
    folder.mkdir(parents=True, exist_ok=True)
    stuff = len(CLASSES) + 1 + STUFF.index(scene.background)
    categories = [stuff, *(category for category, _ in scene.objects)]
    ids = [1000 * category + number for number, category in enumerate(categories)]
    colours = [(i % 256, i // 256 % 256, i // 65536) for i in ids]
    picture, numbers = Image.new("RGB", scene.image.size, colours[0]), Image.new("L", scene.image.size, 0)
    for number, (_, outline) in enumerate(scene.objects, start=1):
        ImageDraw.Draw(picture).polygon(outline, fill=colours[number])
        ImageDraw.Draw(numbers).polygon(outline, fill=number)
    name = f"{image_id:06}.png"
    picture.save(folder / name)
    segments = []
    for number, (segment_id, category) in enumerate(zip(ids, categories, strict=True)):
        box = numbers.point([255 * (value == number) for value in range(256)]).getbbox()
        assert box is not None  # objects overlap little
        left, top, right, bottom = box
        entry = {"id": segment_id, "category_id": category, "iscrowd": 0, "area": numbers.histogram()[number]}
        segments.append(entry | {"bbox": [left, top, right - left, bottom - top]})
    return {"file_name": name, "segments_info": segments}


def draw_scene(rng: random.Random) -> Scene:
    """Return a scene of 96 to 128 pixels per side."""
    width, height = rng.randint(96, 128), rng.randint(96, 128)
    image = background(rng, width * SUPERSAMPLING, height * SUPERSAMPLING)
    stuff = STUFF[ImageStat.Stat(image.convert("L")).mean[0] >= MEAN_LUMA]
    draw = ImageDraw.Draw(image)
    objects: list[tuple[int, list[Point]]] = []
    for _ in range(0 if rng.random() < EMPTY else rng.randint(1, MAX_OBJECTS)):
        category = rng.randint(1, len(CLASSES))
        outline = place_shape(rng, CLASSES[category - 1], width, height)
        if all(overlap(outline, other) <= MAX_OVERLAP for _, other in objects):
            hue = HUES[category - 1] + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
            colour = to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0))
            draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline], fill=colour)
            objects.append((category, outline))
    return Scene(image.resize((width, height), Image.Resampling.BOX), objects, stuff)


def background(rng: random.Random, width: int, height: int) -> Image.Image:
    """Return a muted background: plain, a gradient, stripes, or blurred noise."""
    first, second = (to_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.1, 0.9)) for _ in range(2))
    kind = rng.choice(("plain", "gradient", "stripes", "noise"))
    if kind == "plain":
        return Image.new("RGB", (width, height), first)
    if kind == "gradient":
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
    elif kind == "stripes":
        mask = Image.new("L", (width, height))
        draw, step = ImageDraw.Draw(mask), rng.randint(8, 24) * SUPERSAMPLING
        for x in range(-height, width, 2 * step):
            draw.line([(x, 0), (x + height, height)], fill=rng.randint(60, 160), width=step)
    else:
        coarse = Image.frombytes("L", (16, 16), rng.randbytes(256))
        mask = coarse.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(SUPERSAMPLING))
    return Image.composite(Image.new("RGB", (width, height), first), Image.new("RGB", (width, height), second), mask)


def place_shape(rng: random.Random, name: str, width: int, height: int) -> list[Point]:
    """Return the outline of a shape within the image, about 25 to 80 pixels across."""
    radius = rng.uniform(18, 40)
    corners, start = {"circle": (36, 0), "square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[name]
    start += math.radians(rng.uniform(-MAX_TILT, MAX_TILT))
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    outline = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
    left, top, right, bottom = bounds(outline)
    x, y = rng.uniform(-left, width - right), rng.uniform(-top, height - bottom)
    return [(round(x + dx, 2), round(y + dy, 2)) for dx, dy in outline]


def to_rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Return a colour of 8 bits per channel; hues repeat at every integer."""
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue


def bounds(outline: list[Point]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of an outline."""
    xs, ys = zip(*outline, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def overlap(a: list[Point], b: list[Point]) -> float:
    """Return the intersection of two outlines' boxes, relative to the smaller box."""
    left_a, top_a, right_a, bottom_a = bounds(a)
    left_b, top_b, right_b, bottom_b = bounds(b)
    width = min(right_a, right_b) - max(left_a, left_b)
    height = min(bottom_a, bottom_b) - max(top_a, top_b)
    smaller = min((right_a - left_a) * (bottom_a - top_a), (right_b - left_b) * (bottom_b - top_b))
    return max(width, 0) * max(height, 0) / smaller


def polygon_fields(outline: list[Point], mask: bool = True) -> dict[str, Any]:
    """Return COCO's `bbox`, `area` and, if `mask` is True, `segmentation` of an outline."""
    left, top, right, bottom = bounds(outline)
    edges = zip(outline, [*outline[1:], outline[0]], strict=True)
    area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in edges)) / 2
    fields = {"bbox": [left, top, round(right - left, 2), round(bottom - top, 2)], "area": round(area, 2)}
    return fields | ({"segmentation": [[coordinate for point in outline for coordinate in point]]} if mask else {})


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m datasets.shapes",
        description="Write a generated data set in COCO format.",
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--train", default=2400, type=int, help="number of training images")
    parser.add_argument("--val", default=200, type=int, help="number of validation images")
    parser.add_argument("--masks", action="store_true", help="write segmentations of the objects")
    parser.add_argument("--panoptic", action="store_true", help="write panoptic annotations, backgrounds as stuff")
    parser.add_argument("--seed", default=0, type=int, help="seed of the scenes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_parser().parse_args(argv)
    check_numbers(args)
    check_texts({"--output": args.output})
    try:
        write_dataset(args.output, args.train, args.val, args.seed, args.masks or args.panoptic, args.panoptic)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run_command(main)
