"""Postprocessing of the mask head: masks of detections, and panoptic segmentations.

Shapes: B images, Q queries, K logits, N detections per image; masks are computed at a quarter of the padded size.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.classification import Classification, SoftmaxWithNoObject
from models.not_scriptable import NotScriptable

LAST_THING = 90  # the highest category id of COCO's things
MOST_QUERIES = 32  # the most masks that are computed at once, which bounds the memory
SMALLEST = 4  # pixels; segments up to this size are removed

T = TypeVar("T")


class PostProcessSegm(NotScriptable, nn.Module):
    """Postprocessor that adds masks to detections (DETR's `PostProcessSegm`).

    Args:
        threshold: of the probability that a pixel belongs to an object.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, Tensor]],
        outputs: dict[str, Any],
        orig_target_sizes: Tensor,
        max_target_sizes: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Add `masks` [N, 1, height, width], uint8, to the results of `PostProcess`, and return them.

        Args:
            results: their `queries` [N] say which mask belongs to which detection.
            outputs: of a model with masks.
            orig_target_sizes: [B, 2], (height, width) of the images, for which masks are returned.
            max_target_sizes: [B, 2], (height, width) of the images in the batch, without padding.
        """
        original, in_batch = orig_target_sizes.tolist(), max_target_sizes.tolist()
        of_images = self.of_detections(results, outputs, original, in_batch, list)
        for result, size, masks in zip(results, original, of_images, strict=True):
            none = result["queries"].new_zeros(0, 1, *size, dtype=torch.uint8)
            result["masks"] = torch.stack(masks) if masks else none
        return results

    def of_detections(
        self,
        results: Sequence[dict[str, Tensor]],
        outputs: dict[str, Any],
        original: Sequence[Sequence[int]],
        in_batch: Sequence[Sequence[int]],
        convert: Callable[[Tensor], Iterable[T]],
    ) -> Iterator[list[T]]:
        """Yield a list for each image, the converted masks of its N detections. The mask of a query is computed once.

        Args:
            results, outputs: see `forward`.
            original, in_batch: (height, width) of the images, and of the resized ones in the batch.
            convert: converts at most `MOST_QUERIES` masks [.., 1, height, width]; no more are in memory at once.
        """
        padded = [max(sides) for sides in zip(*in_batch, strict=True)]
        for image, (result, *sizes) in enumerate(zip(results, in_batch, original, strict=True)):
            queries, detection = result["queries"].unique(return_inverse=True)
            parts = logits_in_parts(outputs, image, queries)
            masks = [mask for logits in parts for mask in convert(self.binary(logits, padded, *sizes))]
            yield [masks[i] for i in detection.tolist()]

    def binary(self, logits: Tensor, padded: Sequence[int], size: Sequence[int], original: Sequence[int]) -> Tensor:
        """Return masks [N, 1, *original] of 0 and 1 for mask logits [N, H / 4, W / 4] of an image.

        padded, size and original are the (height, width) of the batch, of the image in it, and of the image itself.
        """
        logits = F.interpolate(logits[:, None], size=padded, mode="bilinear", align_corners=False)
        masks = (logits[..., : size[0], : size[1]].sigmoid() > self.threshold).to(torch.uint8)
        return F.interpolate(masks, size=original, mode="nearest")

    def extend(
        self, detections: list[dict[str, Any]], outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> list[dict[str, Any]]:
        """Return the detections of earlier postprocessors with masks of the original images' sizes."""
        original, in_batch = (torch.stack([target[key] for target in targets]) for key in ("orig_size", "size"))
        return self(detections, outputs, original, in_batch)


class PostProcessPanoptic(NotScriptable, nn.Module):
    """Postprocessor that assigns each pixel to one segment (DETR, section 4.4 and its `PostProcessPanoptic`).

    Args:
        is_thing_map: by category id, True for things, whose objects are separate segments, and False for stuff, which
            has one segment per class. Ids that are not in it are not predicted. By default, ids up to 90 are things
            and all others are stuff.
        threshold: of the scores of queries that become segments.
        classification: defines the scores of logits.
    """

    def __init__(
        self,
        is_thing_map: Mapping[int, bool] | None = None,
        threshold: float = 0.85,
        classification: Classification | None = None,
    ) -> None:
        super().__init__()
        self.is_thing: Callable[[int], bool] = is_thing_map.__getitem__ if is_thing_map else LAST_THING.__ge__
        self.is_class: Callable[[int], bool] = is_thing_map.__contains__ if is_thing_map else lambda _: True
        self.threshold = threshold
        self.classification = classification or SoftmaxWithNoObject()

    @torch.no_grad()
    def forward(
        self,
        outputs: dict[str, Any],
        processed_sizes: Sequence[Any] | Tensor,
        target_sizes: Sequence[Any] | Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Return `ids` [height, width], `segments_info` and `png_string` for each image.

        A segment's id is its index in `segments_info`, whose entries have `id`, `isthing`, `category_id` and `area`.
        The PNG holds the ids in COCO's format, R + 256 G + 65536 B. Without segments, all ids are 0.

        Args:
            outputs: of a model with masks.
            processed_sizes: (height, width) of the images in the batch, without padding.
            target_sizes: (height, width) of the results, by default `processed_sizes`.
        """
        scores, labels = self.classification.best(outputs["pred_logits"])
        processed = as_sizes(processed_sizes)
        targets = processed if target_sizes is None else as_sizes(target_sizes)
        results = []
        for image, (size, target) in enumerate(zip(processed, targets, strict=True)):
            queries = (scores[image] > self.threshold).nonzero()[:, 0]
            queries = queries[[self.is_class(label) for label in labels[image, queries].tolist()]]
            parts = [
                F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
                for logits in logits_in_parts(outputs, image, queries)
            ]
            masks = torch.cat([outputs["pred_logits"].new_zeros(0, *size), *parts])
            results.append(self.segments(masks, labels[image, queries].tolist(), target))
        return results

    def segments(self, masks: Tensor, classes: list[int], size: tuple[int, int]) -> dict[str, Any]:
        """Return the result of an image, of the given size, for mask logits [N, h, w] and the classes of N queries."""
        same_stuff = defaultdict(list)
        for i, category in enumerate(classes):
            if not self.is_thing(category):
                same_stuff[category].append(i)
        merge_into = {i: first for first, *others in same_stuff.values() for i in others}
        ids, areas = segment_ids(masks, size, merge_into)
        while small := [i for i, area in enumerate(areas) if area <= SMALLEST]:
            kept = [i for i in range(len(classes)) if i not in small]
            masks, classes = masks[kept], [classes[i] for i in kept]
            ids, areas = segment_ids(masks, size, {})
        segments = [
            {"id": i, "isthing": self.is_thing(category), "category_id": category, "area": area}
            for i, (category, area) in enumerate(zip(classes, areas, strict=True))
        ]
        return {"ids": ids, "segments_info": segments, "png_string": png_of_ids(ids)}

    def extend(
        self, detections: list[dict[str, Any]], outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> list[dict[str, Any]]:
        """Return the detections of earlier postprocessors, each with its image's result as `panoptic`."""
        in_batch, original = ([target[key].tolist() for target in targets] for key in ("size", "orig_size"))
        results = self(outputs, in_batch, original)
        return [found | {"panoptic": result} for found, result in zip(detections, results, strict=True)]


def png_of_ids(ids: Tensor) -> bytes:
    """Return segment ids [H, W] as a PNG file in COCO's format: R + 256 G + 65536 B."""
    ids = ids.long()
    rgb = torch.stack([ids % 256, ids // 256 % 256, ids // 65536], dim=-1).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb.cpu().numpy()).save(file, "PNG")
    return file.getvalue()


def logits_in_parts(outputs: dict[str, Any], image: int, queries: Tensor) -> Iterator[Tensor]:
    """Yield the mask logits of an image's queries, [at most `MOST_QUERIES`, H / 4, W / 4] each."""
    for part in queries.split(MOST_QUERIES) if len(queries) else ():
        if "pred_masks" in outputs:
            yield outputs["pred_masks"][image, part]
        else:
            yield outputs["masks"].of_image(image, part)


def segment_ids(masks: Tensor, size: tuple[int, int], merge_into: Mapping[int, int]) -> tuple[Tensor, list[int]]:
    """Return the segment of each pixel, [*size], and the area of each of N segments, for mask logits [N, h, w].

    Segments in `merge_into` become part of the segments that it maps them to. As in the published code, Pillow chooses
    the nearest pixels, since its rounding differs from PyTorch's.
    """
    if len(masks) == 0:
        return torch.zeros(size, dtype=torch.int64), []
    ids = masks.argmax(0)  # [h, w]
    for i, into in merge_into.items():
        ids[ids == i] = into
    picture = Image.fromarray(ids.to(torch.int32).cpu().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    ids = torch.from_numpy(np.array(picture)).long()
    return ids, ids.flatten().bincount(minlength=len(masks)).tolist()


def as_sizes(sizes: Sequence[Any] | Tensor) -> list[tuple[int, int]]:
    """Return sizes [B, 2], or a sequence of pairs or of tensors, as pairs of integers."""
    return [(int(height), int(width)) for height, width in sizes]
