"""A ResNet-18 so narrow that a model is built, saved and loaded within milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn
from torchvision.models.resnet import ResNet

import models.backbone


class NarrowResNet(ResNet):
    """A ResNet whose four stages have a 64th of the channels."""

    def _make_layer(self, block: type[nn.Module], planes: int, *rest: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 64, *rest, **more)


def is_narrow() -> bool:
    """Return whether resnet18 is narrow now."""
    return models.backbone.ResNet is NarrowResNet


def make_narrow(patch: pytest.MonkeyPatch) -> None:
    """Make resnet18 narrow until the patch is undone."""
    patch.setitem(models.backbone.CHANNELS, "resnet18", 32)  # of bottlenecks: 4 * 512 / 64
    patch.setattr(models.backbone, "ResNet", NarrowResNet)


@contextmanager
def narrowed() -> Iterator[None]:
    """Make resnet18 narrow within the context."""
    with pytest.MonkeyPatch.context() as patch:
        make_narrow(patch)
        yield
