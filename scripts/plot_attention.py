"""Draw a model's attention to an image, like Figure 1 of the paper.

    python -m scripts.plot_attention --checkpoint output/demo/checkpoint.pth --image photo.jpg --output attention.png

For every query, the page shows its detection next to the spatial, the content and the combined attention of each head
of a decoder layer. With --compare, a second model's query for the same object follows; with checkpoints of Conditional
DETR and DETR, this repeats the paper's comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("plot_attention")

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou, nms
from torchvision.transforms.v2.functional import rgb_to_grayscale, to_pil_image

from datasets.classes import Classes
from datasets.images import read_image
from evaluation.attention_maps import AttentionMaps, View, view
from evaluation.pictures import annotate
from models import MODEL_NAMES
from scripts.detector import load_detector
from util.box_ops import box_cxcywh_to_xyxy
from util.command import run_command
from util.errors import InputError
from util.files import replacing

REFERENCE_POINT: dict[str, Any] = {
    "marker": "P",
    "markersize": 9,
    "color": "white",
    "markeredgecolor": "black",
}  # visible on any photo
COLOURS = "inferno"  # perceptually uniform
DPI = 100  # pixels per inch
MAP_WIDTH, MAP_HEIGHT = 1.3, 2.6  # at most; all lengths in inches
GAP, LABELS, TITLE, FOOTER, MARGIN = 0.05, 0.85, 0.3, 0.4, 0.1
LEAST_WIDTH = 6  # of the page, so that the footer fits


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_flags("plot_attention", argv)

    formats = Figure().canvas.get_supported_filetypes()
    if (ending := args.output.suffix.lower().removeprefix(".")) not in formats:
        raise InputError(f"--output {args.output}: the file's name must end in one of .{', .'.join(sorted(formats))}")
    image = read_image(args.image, max_megapixels=args.max_megapixels).pixels
    subject = look(args.checkpoint, image, args)
    check_queries(args.queries or (), len(subject.seen.boxes))
    queries = args.queries or best_queries(subject, args.top)
    blocks = [(subject, query) for query in queries]
    if args.compare:
        other = look(args.compare, image, args)
        partners = [query_for(subject.seen.boxes[query], other) for query in queries]
        blocks = [pair for block, query in zip(blocks, partners, strict=True) for pair in (block, (other, query))]
    figure = draw_page(blocks)
    with replacing(args.output) as file:
        figure.savefig(file, format=ending)
    print(f"wrote {args.output}: queries {', '.join(str(query) for _, query in blocks)}")


class Subject(NamedTuple):
    """An image, and a model's attention and predictions for it.

    name: the name of the model.
    image: [3, H, W] uint8, at the model's evaluation size.
    seen: attention maps, logits, boxes and reference points.
    probabilities: [Q, K], the probabilities of the classes.
    classes: the classes of the model.
    """

    name: str
    image: Tensor
    seen: View
    probabilities: Tensor
    classes: Classes


def look(checkpoint: str, image: Tensor, args: argparse.Namespace) -> Subject:
    """Run the model of a checkpoint on an image [3, h, w].

    Raises:
        InputError: if the model has no layer `--layer`, or its outputs are not finite.
    """
    detector = load_detector(checkpoint, args.device)
    layers = detector.args.dec_layers
    if not -layers <= args.layer < layers:
        raise InputError(f"--layer {args.layer}: the decoder layers of {checkpoint} are 0 to {layers - 1}")
    image = detector.resize(image)
    seen = view(detector.model.detector, image.to(detector.device), args.layer)
    if not all(part.isfinite().all() for part in (*seen.maps, seen.logits, seen.boxes)):
        raise InputError(f"{checkpoint}: the model's outputs for {args.image} are not finite: check its weights")
    probabilities = detector.postprocess.classification.probabilities(seen.logits)
    return Subject(MODEL_NAMES[detector.args.model], image, seen, probabilities, detector.classes)


def check_queries(queries: Sequence[int], number: int) -> None:
    """Raise InputError for a query that the model does not have."""
    for query in queries:
        if not 0 <= query < number:
            raise InputError(f"--queries {query}: the model's queries are 0 to {number - 1}")


def best_queries(subject: Subject, number: int) -> list[int]:
    """Return the queries with the highest scores; of boxes that overlap (IoU above 0.5), only the best counts."""
    boxes = box_cxcywh_to_xyxy(subject.seen.boxes)
    return nms(boxes, subject.probabilities.amax(-1), iou_threshold=0.5)[:number].tolist()


def query_for(box: Tensor, subject: Subject) -> int:
    """Return a model's query for the object in a box [4]: the best box with an IoU of 0.5 or more, else the closest."""
    overlap = box_iou(box_cxcywh_to_xyxy(box[None]), box_cxcywh_to_xyxy(subject.seen.boxes))[0]
    scores = subject.probabilities.amax(-1)
    return int(torch.where(overlap >= 0.5, 1 + scores, overlap).argmax())


class Layout:
    """Layout of a page of blocks, as rectangles for `Figure.add_axes`; photo and maps keep the image's proportions."""

    def __init__(self, width: int, height: int, heads: int, blocks: int) -> None:
        scale = min(MAP_WIDTH / width, MAP_HEIGHT / height)
        self.map_width, self.map_height = scale * width, scale * height
        rows = len(AttentionMaps._fields)
        self.photo_height = rows * (self.map_height + GAP) - GAP
        self.photo_width = self.photo_height * width / height
        self.first_map = MARGIN + self.photo_width + LABELS
        self.block_height = TITLE + self.photo_height + MARGIN
        self.page_width = max(self.first_map + heads * (self.map_width + GAP) + MARGIN, LEAST_WIDTH)
        self.page_height = blocks * self.block_height + FOOTER

    def rectangle(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Convert inches from the page's upper left corner to (left, bottom, width, height) as shares of the page."""
        bottom = self.page_height - top - height
        return left / self.page_width, bottom / self.page_height, width / self.page_width, height / self.page_height

    def photo(self, block: int) -> tuple[float, float, float, float]:
        return self.rectangle(MARGIN, block * self.block_height + TITLE, self.photo_width, self.photo_height)

    def map(self, block: int, row: int, head: int) -> tuple[float, float, float, float]:
        left = self.first_map + head * (self.map_width + GAP)
        top = block * self.block_height + TITLE + row * (self.map_height + GAP)
        return self.rectangle(left, top, self.map_width, self.map_height)

    def colour_bar(self) -> tuple[float, float, float, float]:
        return self.rectangle(MARGIN + 0.1, self.page_height - FOOTER, 1.6, 0.12)


def draw_page(blocks: Sequence[tuple[Subject, int]]) -> Figure:
    """Draw a block per model and query: the detection, and the maps with a row per kind and a column per head."""
    height, width = blocks[0][0].image.shape[1:]
    heads = max(len(subject.seen.maps.spatial) for subject, _ in blocks)
    layout = Layout(width, height, heads, len(blocks))
    page = Figure(figsize=(layout.page_width, layout.page_height), dpi=DPI)
    several = len({id(subject) for subject, _ in blocks}) > 1
    for number, (subject, query) in enumerate(blocks):
        axes = page.add_axes(layout.photo(number))
        draw_detection(axes, subject, query)
        axes.set_title(f"{subject.name}, query {query}" if several else f"query {query}", fontsize=9)
        draw_maps(page, layout, number, subject, query)
    draw_footer(page, layout, any(subject.seen.reference is not None for subject, _ in blocks))
    return page


def draw_detection(axes: Axes, subject: Subject, query: int) -> None:
    """Draw the image with a query's box, class and score, and its reference point if it has one."""
    height, width = subject.image.shape[1:]
    label = int(subject.probabilities[query].argmax())
    score = subject.probabilities[query, label]
    size = [max(round(side), 1) for side in (axes.bbox.width, axes.bbox.height)]  # pixels of the page
    box = box_cxcywh_to_xyxy(subject.seen.boxes[query]) * torch.tensor([*size, *size])
    photo = to_pil_image(subject.image).resize(size)
    drawn = annotate(photo, [box.tolist()], [label], [f"{subject.classes.name_of(label)} {score:.2f}"])
    axes.imshow(drawn, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    if subject.seen.reference is not None:
        axes.plot(*(subject.seen.reference[query] * torch.tensor([width, height])).tolist(), **REFERENCE_POINT)


def draw_maps(page: Figure, layout: Layout, block: int, subject: Subject, query: int) -> None:
    """Draw the attention maps of a query: a row per kind, a column per head."""
    height, width = subject.image.shape[1:]
    backdrop = rgb_to_grayscale(subject.image)[0].numpy()
    box = (box_cxcywh_to_xyxy(subject.seen.boxes[query]) * torch.tensor([width, height, width, height])).tolist()
    for row, (name, maps) in enumerate(zip(AttentionMaps._fields, subject.seen.maps, strict=True)):
        for head, attention in enumerate(maps[:, query].numpy()):
            axes = page.add_axes(layout.map(block, row, head))
            draw_map(axes, backdrop, attention, box)
            if row == 0:
                axes.set_title(f"head {head}", fontsize=9)
            if head == 0:
                axes.set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")


def draw_map(axes: Axes, backdrop: np.ndarray, attention: np.ndarray, box: Sequence[float]) -> None:
    """Draw attention [H', W'] over a grey image [H, W], and outline a box (xyxy in pixels).

    All cells cover equal parts of the image; values belong to their centres and are interpolated in between.
    """
    height, width = backdrop.shape
    attention = attention / attention.max()
    extent = (0, width, height, 0)  # integers are edges of pixels, not centres
    axes.imshow(backdrop, "gray", vmin=0, vmax=1.5 * 255, extent=extent)  # dimmed
    shown: dict[str, Any] = {"vmin": 0, "vmax": 1, "alpha": 0.4 + 0.5 * attention, "interpolation": "bilinear"}
    axes.imshow(attention, COLOURS, extent=extent, **shown)
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def draw_footer(page: Figure, layout: Layout, with_points: bool) -> None:
    """Draw the legend of the colours, and of the reference points."""
    axes = page.add_axes(layout.colour_bar())
    bar = page.colorbar(ScalarMappable(cmap=COLOURS), axes, orientation="horizontal", ticks=[0, 1])
    bar.ax.set_xticklabels(["0", "maximum"], fontsize=8)
    text = "attention, each map divided by its maximum" + ";  + the query's reference point" * with_points
    axes.annotate(text, (1, 0.5), (30, 0), "axes fraction", "offset points", va="center", fontsize=9)


if __name__ == "__main__":
    run_command(main)
