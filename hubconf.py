"""torch.hub entries, each of which loads a published model in one line.

    model = torch.hub.load("OWNER/REPOSITORY", "conditional_detr_resnet50", pretrained=True)
    outputs = model([image])  # uint8 [3, h, w], or float and normalised

Models are in evaluation mode, without auxiliary outputs, and need only torch, torchvision and scipy. `torch.hub.list`
shows all functions of this file whose names do not begin with an underscore.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from collections.abc import Iterator as _Iterator

    from torch.nn import Module as _Module

    _Entry = _Module | tuple[_Module, _Module]  # the model, or with its postprocessor

dependencies = ["torch", "torchvision", "scipy"]

_ROOT = pathlib.Path(__file__).resolve().parent
_MODEL_PACKAGES = ("models", "util")
_LOADING_PACKAGES = ("checkpoints", "datasets", "flags")  # not needed by a loaded model
_PACKAGES = (*_MODEL_PACKAGES, *_LOADING_PACKAGES)
_NUM_CLASSES = 91  # COCO's ids end at 90
_PANOPTIC_CLASSES = 250  # the ids of stuff end at 200
_set_aside: dict[str, types.ModuleType] = {}  # our modules, while another project's modules have their names


def conditional_detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> _Entry:
    """Conditional DETR with ResNet-50. Published after 50 epochs: 41.0 AP on COCO val2017."""
    return _build("conditional_detr_resnet50", pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> _Entry:
    """Conditional DETR with a dilated ResNet-50. Published after 50 epochs: 43.7 AP on COCO val2017."""
    return _build("conditional_detr_resnet50_dc5", pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> _Entry:
    """Conditional DETR with ResNet-101. Published after 50 epochs: 42.8 AP on COCO val2017."""
    return _build("conditional_detr_resnet101", pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
) -> _Entry:
    """Conditional DETR with a dilated ResNet-101. Published after 50 epochs: 45.0 AP on COCO val2017."""
    return _build("conditional_detr_resnet101_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet50(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Entry:
    """DETR with ResNet-50. Published after 500 epochs: 42.0 AP on COCO val2017."""
    return _build("detr_resnet50", pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Entry:
    """DETR with a dilated ResNet-50. Published after 500 epochs: 43.3 AP on COCO val2017."""
    return _build("detr_resnet50_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet101(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Entry:
    """DETR with ResNet-101. Published after 500 epochs: 43.5 AP on COCO val2017."""
    return _build("detr_resnet101", pretrained, num_classes, return_postprocessor)


def detr_resnet101_dc5(pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Entry:
    """DETR with a dilated ResNet-101. Published after 500 epochs: 44.9 AP on COCO val2017."""
    return _build("detr_resnet101_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet50_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> _Entry:
    """DETR with ResNet-50 and the mask head. Published on COCO val2017: PQ 43.4, box AP 38.8, mask AP 31.1."""
    return _build("detr_resnet50_panoptic", pretrained, num_classes, return_postprocessor, threshold)


def detr_resnet50_dc5_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> _Entry:
    """DETR with a dilated ResNet-50 and masks. Published on COCO val2017: PQ 44.6, box AP 40.2, mask AP 31.9."""
    return _build("detr_resnet50_dc5_panoptic", pretrained, num_classes, return_postprocessor, threshold)


def detr_resnet101_panoptic(
    pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
) -> _Entry:
    """DETR with ResNet-101 and the mask head. Published on COCO val2017: PQ 45.1, box AP 40.1, mask AP 33.0."""
    return _build("detr_resnet101_panoptic", pretrained, num_classes, return_postprocessor, threshold)


def _build(
    name: str, pretrained: bool, num_classes: int, return_postprocessor: bool, threshold: float = 0.85
) -> _Entry:
    with_masks = name.endswith("_panoptic")
    published = _PANOPTIC_CLASSES if with_masks else _NUM_CLASSES
    if pretrained and num_classes != published:
        raise ValueError(f"num_classes={num_classes}: the pretrained weights have {published} classes")
    with _own_packages():
        from checkpoints.checkpoint import check_finite, load_checkpoint, load_model_weights
        from checkpoints.published import PUBLISHED
        from models import build_model

        flags = argparse.Namespace(**PUBLISHED[name].flags, aux_loss=False)
        model, _, postprocessors = build_model(flags, num_classes)
        if pretrained:
            checkpoint = load_checkpoint(name)
            check_finite(checkpoint["model"], name)
            load_model_weights(model, checkpoint, name)
        model.eval()
        if with_masks:
            from models.postprocess_masks import PostProcessPanoptic

            model.all_masks = True
            postprocess = PostProcessPanoptic(threshold=threshold)
        else:
            postprocess = postprocessors["bbox"]
        return (model, postprocess) if return_postprocessor else model


@contextlib.contextmanager
def _own_packages() -> _Iterator[None]:
    """Import the packages of this repository within the block, and free their names after it.

    Many projects have packages with these names, and the program that loads a model may have imported its own, or may
    do so later. After the block, our modules are therefore removed from `sys.modules`, except for the model's modules,
    which pickling a model looks for; these are removed, too, if the program has its own with these names.
    """
    before = _modules()
    foreign = {name: module for name, module in before.items() if not _is_ours(before[name.partition(".")[0]])}
    for name in foreign:
        del sys.modules[name]
    sys.modules.update(_set_aside)
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        taken = {*_LOADING_PACKAGES, *(name.partition(".")[0] for name in foreign)}
        for name, module in _modules().items():
            if name.partition(".")[0] in taken and before.get(name) is not module:
                _set_aside[name] = sys.modules.pop(name)
        sys.modules.update(foreign)


def _modules() -> dict[str, types.ModuleType]:
    """Return the imported modules that have the names of our packages, and their submodules."""
    return {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] in _PACKAGES}


def _is_ours(package: types.ModuleType) -> bool:
    return any(pathlib.Path(path).resolve().parent == _ROOT for path in getattr(package, "__path__", ()))
