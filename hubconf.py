"""torch.hub entries: the four published models in one line each.

    model = torch.hub.load("OWNER/REPOSITORY", "conditional_detr_resnet50", pretrained=True)
    outputs = model([image])  # uint8 [3, h, w], or float and normalised

Models come in evaluation mode, without auxiliary outputs. torch, torchvision and scipy are all they need.
"""

from __future__ import annotations

from models.backbone import Backbone, BackboneWithPosition
from models.conditional_detr import ConditionalDETR
from models.position_encoding import PositionEmbeddingSine
from models.postprocess import PostProcess
from models.transformer import Transformer
from util.checkpoint import check_finite, load_checkpoint, load_model_weights
from util.classes import COCO_NUM_CLASSES

dependencies = ["torch", "torchvision", "scipy"]

Entry = ConditionalDETR | tuple[ConditionalDETR, PostProcess]


def conditional_detr_resnet50(
    pretrained: bool = False, num_classes: int = COCO_NUM_CLASSES, return_postprocessor: bool = False
) -> Entry:
    """Conditional DETR with ResNet-50. Published after 50 epochs: 41.0 AP on COCO val2017."""
    return _build("conditional_detr_resnet50", "resnet50", False, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = COCO_NUM_CLASSES, return_postprocessor: bool = False
) -> Entry:
    """Conditional DETR with a dilated ResNet-50. Published after 50 epochs: 43.7 AP on COCO val2017."""
    return _build("conditional_detr_resnet50_dc5", "resnet50", True, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101(
    pretrained: bool = False, num_classes: int = COCO_NUM_CLASSES, return_postprocessor: bool = False
) -> Entry:
    """Conditional DETR with ResNet-101. Published after 50 epochs: 42.8 AP on COCO val2017."""
    return _build("conditional_detr_resnet101", "resnet101", False, pretrained, num_classes, return_postprocessor)


def conditional_detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = COCO_NUM_CLASSES, return_postprocessor: bool = False
) -> Entry:
    """Conditional DETR with a dilated ResNet-101. Published after 50 epochs: 45.0 AP on COCO val2017."""
    return _build("conditional_detr_resnet101_dc5", "resnet101", True, pretrained, num_classes, return_postprocessor)


def _build(
    name: str, backbone: str, dilation: bool, pretrained: bool, num_classes: int, return_postprocessor: bool
) -> Entry:
    if pretrained and num_classes != COCO_NUM_CLASSES:
        raise ValueError(f"num_classes={num_classes}: the pretrained weights have {COCO_NUM_CLASSES} classes")
    model = ConditionalDETR(
        BackboneWithPosition(Backbone(backbone, dilation), PositionEmbeddingSine(256)),
        Transformer(dim=256),
        dim=256,
        num_classes=num_classes,
        num_queries=300,
    )
    if pretrained:
        checkpoint = load_checkpoint(name)
        check_finite(checkpoint["model"], name)
        load_model_weights(model, checkpoint, name)
    model.eval()
    return (model, PostProcess()) if return_postprocessor else model
