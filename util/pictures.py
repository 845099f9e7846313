"""Pictures of images with boxes, and curves of a run's log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

mpl.use("Agg")  # draws to files; no screen is needed


def draw_boxes(
    axes: Axes,
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
    title: str = "",
) -> None:
    """Shows an image [H, W, 3] with boxes (xyxy in pixels), a colour for each label, and a text at each box."""
    colours = mpl.colormaps["tab10"].colors
    height, width = image.shape[:2]
    axes.imshow(image)
    for (x1, y1, x2, y2), label, text in zip(boxes, labels, texts, strict=True):
        colour = colours[label % len(colours)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.8))
        label_at = {"x": min(max(x1, 0), width), "y": min(max(y1, 0.08 * height), height)}  # inside, also at the border
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.text(**label_at, s=text, fontsize=7, color="white", va="bottom", ha="left", bbox=style)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def plot_log(log_file: str | Path, output: str | Path) -> None:
    """Draws the loss and AP curves of a run's log.txt into a picture file."""
    lines = [json.loads(line) for line in Path(log_file).read_text(encoding="utf-8").splitlines()]
    evaluated = [line for line in lines if "test_loss" in line]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, precision = figure.subplots(1, 2)
    loss.plot([line["epoch"] + 1 for line in lines], [line["train_loss"] for line in lines], label="train")
    epochs = [line["epoch"] + 1 for line in evaluated]
    loss.plot(epochs, [line["test_loss"] for line in evaluated], label="val")
    loss.set(xlabel="epoch", ylabel="loss", title="Loss")
    for name, number in (("AP", 0), ("AP50", 1)):
        precision.plot(epochs, [line["test_coco_eval_bbox"][number] for line in evaluated], label=name, marker=".")
    precision.set(xlabel="epoch", ylim=(0, 1), title="Average precision on val")
    for axes in (loss, precision):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(output, dpi=110)
