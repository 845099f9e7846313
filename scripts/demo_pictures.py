"""Shows what a trained model sees: predictions beside ground truth, and the curves of the run.

    python -m scripts.demo_pictures --output_dir output/demo

Reads checkpoint.pth and log.txt of the run's folder; writes predictions.png, curves.png and curves.svg there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, for which Python looks for modules in scripts/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("demo_pictures")

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torchvision.ops import batched_nms

from datasets import build_dataset
from evaluation.pictures import draw_boxes
from scripts.detector import load_detector
from scripts.plot_logs import plot_logs
from util.box_ops import box_cxcywh_to_xyxy
from util.command import run_command

ROWS, PAIRS = 4, 3  # of (ground truth, prediction) pairs on the page


@torch.no_grad()
def draw_predictions(run: Path, threshold: float) -> Path:
    """Draws the first val images that have boxes with their ground truth, beside it the detections above a score.

    After a few minutes of training the model still finds many an object twice: of detections that overlap by half, only
    the best is drawn.
    """
    detector = load_detector(str(run / "checkpoint.pth"))
    dataset = build_dataset("val", detector.args)
    names = dataset.classes.names

    figure = Figure(figsize=(3.3 * PAIRS, 1.75 * ROWS), layout="constrained")
    pairs = figure.subplots(ROWS, 2 * PAIRS).reshape(-1, 2)
    for axes in pairs.flat:
        axes.set_axis_off()
    shown = [index for index in range(len(dataset)) if len(dataset.records.objects_of(index).labels)]
    for (left, right), index in zip(pairs, shown, strict=False):
        image, target = dataset[index]
        size = target["size"]
        pixels = image.permute(1, 2, 0).numpy()
        truth = box_cxcywh_to_xyxy(target["boxes"]) * size.flip(0).repeat(2)
        (found,) = detector.postprocess(detector.model([image]), size[None])
        found = {key: value[found["scores"] > threshold] for key, value in found.items()}
        best = batched_nms(found["boxes"], found["scores"], found["labels"], iou_threshold=0.5)
        found = {key: value[best] for key, value in found.items()}
        labels = target["labels"].tolist()
        draw_boxes(left, pixels, truth.tolist(), labels, [names[i] for i in labels], "ground truth")
        labels = found["labels"].tolist()
        texts = [f"{names.get(i, i)} {s:.2f}" for i, s in zip(labels, found["scores"].tolist(), strict=True)]
        draw_boxes(right, pixels, found["boxes"].tolist(), labels, texts, "prediction")
    figure.savefig(run / "predictions.png", dpi=110)
    return run / "predictions.png"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_flags("demo_pictures", argv)
    print(f"wrote {draw_predictions(args.output_dir, args.threshold)}")
    for path in plot_logs([args.output_dir], args.output_dir / "curves"):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
