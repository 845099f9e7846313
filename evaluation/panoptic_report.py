"""Report of panoptic quality: PQ per class, and the images with the lowest PQ."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from datasets.images import read_image
from datasets.panoptic import ids_of_pixels
from evaluation.panoptic_pictures import draw_segments
from evaluation.panoptic_quality import PanopticEvaluator
from evaluation.pictures import side_by_side
from evaluation.report import WORST, draw_bars, shown_bars
from util.distributed import is_main_process
from util.files import replacing
from util.logger import log
from util.text import counted


def write_panoptic_report(evaluator: PanopticEvaluator, folder: Path) -> None:
    """Write `panoptic_quality.png` (PQ per class) and `worst_panoptic/`, on the main process only.

    The evaluator has already written its predictions to its own folder.
    """
    if not is_main_process():
        return
    with replacing(folder / "panoptic_quality.png") as file:
        quality_by_class(evaluator).savefig(file, dpi=110, format="png")
    drawn = write_worst_images(evaluator, folder / "worst_panoptic")
    pictures = counted(drawn, "picture")
    log(f"wrote panoptic_eval/, panoptic_quality.png and {pictures} in worst_panoptic/ to {folder}", "green")


def quality_by_class(evaluator: PanopticEvaluator) -> Figure:
    """Return a figure of PQ per class, the highest first, with things and stuff next to each other."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    groups = {True: ("Things", "PQ_th"), False: ("Stuff", "PQ_st")}
    rows = []
    for axes, (isthing, (title, key)) in zip(figure.subplots(1, 2), groups.items(), strict=True):
        of_group = {k: pq for k, pq in evaluator.quality_by_class().items() if evaluator.classes.isthing[k] is isthing}
        ranked = sorted(of_group.items(), key=lambda item: -item[1])
        bars = shown_bars([(evaluator.classes.name_of(label), pq) for label, pq in ranked])
        draw_bars(axes, bars, "PQ")
        axes.set_title(f"{title}: PQ {evaluator.stats[key]['pq']:.3f}")
        rows.append(len(bars))
    figure.set_figheight(max(3.6, 0.8 + 0.19 * max(rows)))
    return figure


def write_worst_images(evaluator: PanopticEvaluator, folder: Path) -> int:
    """Draw the images with the lowest PQ, replace pictures of an earlier evaluation, and return their number."""
    for old in folder.glob("[0-9][0-9]_*.jpg"):
        old.unlink()
    qualities = {image_id: evaluator.quality_of_image(image_id) for image_id in sorted(evaluator.predictions)}
    scored = {image_id: quality for image_id, quality in qualities.items() if quality is not None}
    worst = sorted(scored.items(), key=lambda item: item[1])[:WORST]
    for rank, (image_id, quality) in enumerate(worst, start=1):
        with replacing(folder / f"{rank:02}_{image_id}.jpg") as file:
            draw_image(evaluator, image_id, quality).save(file, "JPEG", quality=90)
    return len(worst)


def draw_image(evaluator: PanopticEvaluator, image_id: int, quality: float) -> Image.Image:
    """Return the picture of an image with its ground truth next to the prediction."""
    dataset = evaluator.dataset
    index = dataset.ids.index(image_id)
    image = to_pil_image(dataset.load_image(index).pixels)
    true_ids, true = dataset.segments_of(index)
    entry = evaluator.entry_of(image_id)
    assert evaluator.folder is not None  # it holds the predictions
    found_ids = ids_of_pixels(read_image(evaluator.folder / entry["file_name"]).pixels)
    found = [(segment["id"], segment["category_id"]) for segment in entry["segments_info"]]
    panels = [
        draw_segments(image, ids, part, evaluator.classes) for ids, part in ((true_ids, true), (found_ids, found))
    ]
    titles = [
        f"ground truth: {counted(len(true), 'segment')}",
        f"model: {counted(len(found), 'segment')}, PQ {quality:.2f}",
    ]
    return side_by_side(panels, titles)
