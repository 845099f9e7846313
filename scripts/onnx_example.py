"""Find objects in photos with a model from `scripts.export_onnx`: NumPy, Pillow and ONNX Runtime, no PyTorch.

    python scripts/onnx_example.py model.onnx photo.jpg another.jpg --threshold 0.5

This is an example to copy: it imports nothing from this project. It runs models with and without `--postprocess`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image

NUM_DETECTIONS = 100
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]  # without formats for which Pillow runs other programs


def resize(image: Image.Image, min_size: int, max_size: int) -> Image.Image:
    """Scale the short side to `min_size`, or less if the long side would exceed `max_size`."""
    short, long = sorted(image.size)
    size = max(min(min_size, round(max_size * short / long)), 1)
    other = int(size * long / short)
    return image.resize((size, other) if image.width < image.height else (other, size), Image.Resampling.BILINEAR)


def batch(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Pad images of any sizes at the right and bottom; return them as [B, 3, H, W], and their mask [B, H, W]."""
    height, width = max(image.height for image in images), max(image.width for image in images)
    pixels = np.zeros((len(images), 3, height, width), np.uint8)
    padding = np.ones((len(images), height, width), bool)
    for i, image in enumerate(images):
        pixels[i, :, : image.height, : image.width] = np.asarray(image).transpose(2, 0, 1)
        padding[i, : image.height, : image.width] = False
    return pixels, padding


def postprocess(
    logits: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, model: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores and labels [B, N] and boxes [B, N, 4] in pixels, as `--postprocess` computes them in the model."""
    if model == "detr":  # a softmax with "no object" as its last class; each query has one class
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = (exponentials / exponentials.sum(-1, keepdims=True))[..., :-1]  # [B, Q, K]
        scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    else:  # a sigmoid per class; a query may have several classes
        probabilities = (1 / (1 + np.exp(-logits))).reshape(len(logits), -1)  # [B, Q·K]
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :NUM_DETECTIONS]
        queries, labels = np.divmod(best, logits.shape[2])
        scores = np.take_along_axis(probabilities, best, axis=1)
        boxes = np.take_along_axis(boxes, queries[..., None], axis=1)
    x, y, width, height = np.moveaxis(boxes, -1, 0)
    corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=-1)
    return scores, labels, corners * sizes[:, None, [1, 0, 1, 0]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find objects in photos, without PyTorch.")
    parser.add_argument("model", help="ONNX file from scripts.export_onnx")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--threshold", default=0.5, type=float, help="lowest score that is printed")
    flags = parser.parse_args()
    if not 0 <= flags.threshold <= 1:
        parser.error(f"--threshold {flags.threshold}: scores are between 0 and 1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold characters that the terminal lacks
        sys.stdout.reconfigure(errors="replace")

    session = onnxruntime.InferenceSession(flags.model, providers=["CPUExecutionProvider"])
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    photos = [Image.open(path, formats=FORMATS).convert("RGB") for path in flags.images]
    sizes = np.array([(photo.height, photo.width) for photo in photos])
    images, padding = batch([resize(photo, facts["min_size"], facts["max_size"]) for photo in photos])

    if "scores" in [output.name for output in session.get_outputs()]:
        inputs = {"images": images, "padding_mask": padding, "target_sizes": sizes}
        found = session.run(["scores", "labels", "boxes"], inputs)
    else:
        logits, boxes = session.run(["pred_logits", "pred_boxes"], {"images": images, "padding_mask": padding})
        found = postprocess(logits, boxes, sizes, facts["model"])

    for path, *detections in zip(flags.images, *found, strict=True):
        print(path)
        for score, label, box in zip(*detections, strict=True):
            name = facts["class_names"].get(str(label))  # some labels of COCO's numbering stand for no class
            if score >= flags.threshold and name:
                print(f"  {score:.3f} {name} (id {facts['class_ids'][str(label)]}) at", *(f"{x:.1f}" for x in box))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # enough for an example: one line about files that cannot be read
        sys.exit(f"error: {error}")
