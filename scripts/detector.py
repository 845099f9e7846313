"""Detector: a trained model with everything needed to find objects in images; most tools in this folder use it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from checkpoints.checkpoint import (
    check_finite,
    check_stored_flags,
    classes_of,
    load_checkpoint,
    load_model_weights,
    num_classes_of,
)
from datasets.classes import Classes
from datasets.coco_eval import encode_masks
from datasets.transforms import resized_size
from flags.limits import check_device
from flags.resolve import Flags, resolve
from models import build_model, detector
from models.postprocess import PostProcess, check_detections
from models.postprocess_masks import PostProcessPanoptic, PostProcessSegm
from models.segmentation import DETRsegm
from run.step import autocast
from util.errors import InputError, reason


@dataclass
class Detector:
    """A model in evaluation mode, without auxiliary outputs.

    Attributes:
        classes: the classes of the model's labels.
        args: the flags of the model's training, completed by the current defaults.
        amp: the precision of the forward pass, none or a key of `run.step.AUTOCAST`.
    """

    model: detector.Detector | DETRsegm
    postprocess: PostProcess
    postprocess_masks: PostProcessSegm | None
    postprocess_panoptic: PostProcessPanoptic | None
    classes: Classes
    args: Flags
    amp: str = "none"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def resize(self, image: Tensor) -> Tensor:
        """Resize an image [3, h, w] to the model's evaluation size (`args.min_size`, `args.max_size`)."""
        width, height = resized_size(image.shape[2], image.shape[1], self.args.min_size, self.args.max_size)
        return F.resize(image, [height, width])

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the detections in uint8 images [3, h, w] of any sizes: a dict per image as from `PostProcess`.

        Boxes are in pixels, and tensors are on the CPU. A model with masks adds `codes`: COCO's run-length codes of the
        N masks at the image's size. A panoptic model adds `panoptic`, a result of `PostProcessPanoptic`.
        """
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return self.detect([self.resize(image) for image in images], sizes)

    @torch.inference_mode()
    def detect(self, resized: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return the detections in images that `resize` has resized; `sizes` are their (height, width) before it."""
        with autocast(self.device, self.amp):
            outputs = self.model([image.to(self.device) for image in resized])
        of_images = self.postprocess(outputs, torch.tensor(sizes, device=self.device))
        codes = self.codes(outputs, of_images, resized, sizes)
        of_images = [{name: value.cpu() for name, value in image.items()} for image in of_images]
        for detections in of_images:
            check_detections(detections)
        results: list[dict[str, Any]] = [found | masks for found, masks in zip(of_images, codes, strict=True)]
        if self.postprocess_panoptic:
            in_batch = [image.shape[1:] for image in resized]
            for result, panoptic in zip(results, self.postprocess_panoptic(outputs, in_batch, sizes), strict=True):
                result["panoptic"] = panoptic
        return results

    def codes(
        self,
        outputs: dict[str, Any],
        of_images: Sequence[dict[str, Tensor]],
        resized: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Return {"codes": run-length codes of the N masks} per image; {} per image for a model without masks."""
        if self.postprocess_masks is None:
            return [{} for _ in of_images]
        in_batch = [image.shape[1:] for image in resized]
        codes = self.postprocess_masks.of_detections(of_images, outputs, sizes, in_batch, encode_masks)
        return [{"codes": of_image} for of_image in codes]


def load_detector(source: str, device: str | torch.device = "cpu") -> Detector:
    """Return the detector of a checkpoint.

    Args:
        source: a file, a folder, a URL or a hub entry's name, as for `checkpoints.checkpoint.load_checkpoint`.
        device: the device of the model.

    Raises:
        InputError: if there is no checkpoint, its weights do not fit its flags, or the device cannot be used.
    """
    check_device(str(device))
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: cannot be used ({reason(error)})") from error
    return build_detector(load_checkpoint(source), source, device)


def build_detector(checkpoint: dict[str, Any], source: str, device: str | torch.device = "cpu") -> Detector:
    """Return the detector of a checkpoint that is already loaded; `source` names the checkpoint in errors."""
    check_finite(checkpoint["model"], source)
    args = resolve(argparse.Namespace(**checkpoint["args"]), aux_loss=False)
    check_stored_flags(args, source)
    classes = classes_of(checkpoint, source)
    args = resolve(args, dataset_file="coco_panoptic" if classes.isthing else "coco")
    model, _, postprocessors = build_model(args, num_classes_of(checkpoint, source), classes.isthing)
    load_model_weights(model, checkpoint, source)
    masks, panoptic = postprocessors.get("segm"), postprocessors.get("panoptic")
    return Detector(model.to(device).eval(), postprocessors["bbox"], masks, panoptic, classes, args)
