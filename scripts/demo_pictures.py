"""Show the results of a trained model: predictions next to ground truth, and the curves of the run.

    python -m scripts.demo_pictures --output_dir output/demo

The tool reads checkpoint.pth and log.txt in the run's folder, and writes predictions.png, curves.png and curves.svg
there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules only in scripts/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.flags import check_early, parse_flags

if __name__ == "__main__":  # the imports below take seconds
    check_early("demo_pictures")

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import batched_nms, box_convert

from datasets import build_dataset
from evaluation.mistakes import compare, select_masks
from evaluation.pictures import contact_sheet
from scripts.detector import load_detector
from scripts.plot_logs import plot_logs
from util.command import run_command
from util.files import replacing

PICTURES, COLUMNS = 6, 2  # of the page; a picture shows an image twice: with ground truth, and with detections
SIDE = 320  # pixels, the long side of an image


def draw_predictions(run: Path, threshold: float) -> Path:
    """Draw the first val images with several objects and with one object: ground truth next to detections.

    After a few minutes of training, the model still finds some objects twice. Therefore, if detections of a class
    overlap with an IoU above 0.5, only the best of them is drawn.
    """
    detector = load_detector(str(run / "checkpoint.pth"))
    dataset = build_dataset("val", detector.args)
    objects = dataset.objects_per_image()
    several = [i for i, number in enumerate(objects) if number > 1][: PICTURES // 2]
    single = [i for i, number in enumerate(objects) if number == 1][: PICTURES - len(several)]
    pictures = []
    for index in sorted(several + single):
        picture = dataset.load_image(index)
        (detections,) = detector([picture.pixels])
        scores, labels, boxes = (detections[key] for key in ("scores", "labels", "boxes"))
        best = batched_nms(boxes, scores, labels, iou_threshold=0.5)
        rows = torch.cat([labels[:, None], scores[:, None], box_convert(boxes, "xyxy", "xywh")], dim=1)[best]
        codes: Any = detections.get("codes", ())
        masks = dataset.records.codes_of(index), select_masks(codes, best.tolist())
        comparison = compare(rows.double().numpy(), dataset.records.objects_of(index), threshold, masks)
        pictures.append(comparison.draw(picture, dataset.classes, (SIDE, SIDE)))
    path = run / "predictions.png"
    largest = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    with replacing(path) as file:
        contact_sheet(pictures, COLUMNS, tuple(largest)).save(file, "PNG")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_flags("demo_pictures", argv)
    print(f"wrote {draw_predictions(args.output_dir, args.threshold)}")
    for path in plot_logs([args.output_dir], args.output_dir / "curves"):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
