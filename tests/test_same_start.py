"""All processes of a run start with the model of the first process, with every version of torch."""

import pytest
import torch
import torchvision

from models import build_model
from tests import recorded
from tests.conftest import TINY
from tests.forked import run_on_several


@pytest.fixture
def run_recorded(meeting):
    """Run main.py on two processes that save the states of their models."""

    def run(*flags: object) -> None:
        run_on_several(recorded.run, ([*TINY, *map(str, flags)], meeting()), 2)

    return run


@pytest.mark.parametrize("source", ["backbone_weights", "finetune"])
def test_all_processes_start_with_the_weights_and_statistics_that_the_first_has_read(
    source, shapes, tmp_path, parse, run_recorded
):
    """In main.py, only the first process reads such files; the norms are frozen."""
    weights, prefix = torchvision.models.resnet18().state_dict(), "backbone.0.body."
    if source == "finetune":
        args = parse(*TINY, "--backbone_norm", "frozen", "--num_classes", 4)
        weights, prefix = build_model(args)[0].state_dict(), ""
    for name, value in weights.items():
        if "running_" in name:
            value.uniform_(0.5, 1.5)
    torch.save({"model": weights, "args": vars(args)} if source == "finetune" else weights, tmp_path / "weights.pth")

    output = tmp_path / "run"
    frozen = ("--backbone_norm", "frozen", f"--{source}", tmp_path / "weights.pth", "--epochs", 1, "--batch_size", 2)
    run_recorded("--coco_path", shapes, "--output_dir", output, *frozen)
    for moment in ("start", "evaluated"):
        first, second = (torch.load(output / f"{moment}-{rank}.pt") for rank in range(2))
        for name, value in first.items():
            assert torch.equal(second[name], value), (moment, name)
        statistics = {name: value for name, value in weights.items() if "running_" in name}
        assert statistics
        for name, value in statistics.items():
            assert torch.equal(first[prefix + name], value), (moment, name)


def test_all_processes_evaluate_the_random_weights_of_the_first(shapes, tmp_path, run_recorded):
    run_recorded("--coco_path", shapes, "--output_dir", tmp_path, "--eval")
    first, second = (torch.load(tmp_path / f"evaluated-{rank}.pt") for rank in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())
