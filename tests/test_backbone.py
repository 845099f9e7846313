"""Pretrained backbone weights: downloaded once or read from a file, with errors that say what is missing."""

import pytest
import torch
import torchvision

from checkpoints.backbone_weights import load_backbone_weights
from models.backbone import Backbone
from util.errors import InputError
from util.nested_tensor import NestedTensor


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def weights(tmp_path):
    """A file with ResNet-18's state dict, classifier included."""
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", resnet


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_weights_from_a_file(norm, weights):
    path, resnet = weights
    backbone = Backbone("resnet18", norm=norm)
    load_backbone_weights(backbone, "resnet18", str(path))
    assert torch.equal(backbone.body.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    image = torch.randn(1, 3, 64, 64)
    features = backbone.eval()(NestedTensor(image, torch.zeros(1, 64, 64, dtype=torch.bool)))["0"].tensors
    resnet.fc, resnet.avgpool = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(features.flatten(1), resnet.eval()(image))


def test_weights_are_downloaded_once(hub, weights, monkeypatch):
    _, resnet = weights
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save(resnet.state_dict(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        backbone = Backbone("resnet18")
        load_backbone_weights(backbone, "resnet18", "imagenet")
        assert torch.equal(backbone.body.conv1.weight, resnet.conv1.weight)
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]


def test_a_failed_download_says_what_to_do(hub, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError) as error:
        load_backbone_weights(Backbone("resnet50"), "resnet50", "imagenet")
    for part in ("resnet50-0676ba61.pth", str(hub), "no route to host", "--backbone_weights none", "https://"):
        assert part in str(error.value)


def test_files_without_the_right_weights(tmp_path, weights):
    backbone = Backbone("resnet34")
    with pytest.raises(InputError, match=r"absent.pth: no such file; --backbone_weights takes a state dict"):
        load_backbone_weights(backbone, "resnet34", str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(InputError, match=r"text.pth: not a checkpoint, or a damaged one .*; --backbone_weights takes"):
        load_backbone_weights(backbone, "resnet34", str(tmp_path / "text.pth"))
    with pytest.raises(InputError, match="not the weights of resnet34"):
        load_backbone_weights(backbone, "resnet34", str(weights[0]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "of which the file holds only a part"),
        (torch.zeros(64, dtype=torch.int64), "not the weights of resnet18"),
        ([1], "is a list of 1, not a tensor"),
        (torch.nn.Identity(), "an object of type torch.nn.modules.linear.Identity"),
    ],
)
def test_hostile_files(value, message, weights, tmp_path):
    torch.save(weights[1].state_dict() | {"bn1.weight": value}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match=rf"hostile.pth: .*{message}.*; --backbone_weights takes"):
        load_backbone_weights(Backbone("resnet18"), "resnet18", str(tmp_path / "hostile.pth"))
