"""A backbone with norms like those of a trained one, and torchvision's own modules to compare it with."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import Backbone

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def random_norms(network: nn.Module) -> nn.Module:
    """Set the norms of a network to random values like those of a trained one, and return it."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        buffer.copy_(noise + 0.5 if name.endswith(("weight", "running_var")) else noise - 0.5)
    return network


def make_body() -> nn.Module:
    torch.manual_seed(0)
    return random_norms(Backbone("resnet18", train_stem=True)).body


def unfolded(body: nn.Module, image: Tensor = IMAGE) -> Tensor:
    """Return the features that torchvision's own modules compute with a body's weights."""
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).to(body.conv1.weight.dtype)
    resnet.load_state_dict(body.state_dict(), strict=False)
    resnet.avgpool = resnet.fc = nn.Identity()
    with torch.no_grad():
        return resnet(image).view(1, 512, 2, 3)


def features(body: nn.Module, image: Tensor = IMAGE) -> Tensor:
    return body(image)["layer4"]


def assert_same(values: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Check that values are equal up to a fraction of the largest one."""
    assert_close(values, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def predict(body: nn.Module, mode: Callable = torch.no_grad) -> Tensor:
    with mode():
        return features(body.eval(), IMAGE.to(body.conv1.weight.dtype))


def take_step(body: nn.Module, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW(body.parameters(), lr=1e-2, fused=fused)
    features(body).square().mean().backward()
    optimizer.step()
