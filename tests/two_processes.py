"""Functions that a test runs on several processes: they meet, leave each other, or take a training step together."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from engine import take_steps
from models import build_model
from models.criterion import SetCriterion
from models.detector import Detector
from run.progress import Progress
from run.step import Step
from util.distributed import distribute, init_distributed_mode, leave_process_group
from util.nested_tensor import nested_tensor_from_tensor_list


def images_and_targets(boxes: Sequence[int]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return images of one size and targets with the given numbers of boxes."""
    count = len(boxes)
    generator = torch.Generator().manual_seed(7)
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=generator) for _ in range(count)]
    targets = [
        {
            "boxes": torch.rand(n, 4, generator=generator) * 0.5 + 0.2,
            "labels": torch.randint(4, (n,), generator=generator),
            "image_id": torch.tensor([i]),
            "masks": torch.randint(2, (n, 64, 96), dtype=torch.uint8, generator=generator),
        }
        for i, n in enumerate(boxes)
    ]
    return images, targets


def random_model(args: argparse.Namespace, seed: int) -> tuple[Detector, SetCriterion]:
    """Return a model with random weights and statistics of its norms, and its criterion."""
    torch.manual_seed(seed)
    model, criterion, _ = build_model(args)
    for buffer in model.detector.backbone[0].buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model, criterion


def join(rank: int, world_size: int, meeting: dict, args: argparse.Namespace) -> None:
    """Join the other processes at the place that the fixture `meeting` returns."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)} | meeting
    init_distributed_mode(args)


def leave_while_sending(rank: int, world_size: int, meeting: dict, args: argparse.Namespace) -> None:
    """Leave the others while a thread sends or receives a large tensor that nothing else refers to."""
    join(rank, world_size, meeting, args)
    dist.broadcast(torch.zeros(2**26, dtype=torch.uint8), 0, async_op=True)
    leave_process_group()


def step(
    rank: int,
    world_size: int,
    meeting: dict,
    args: argparse.Namespace,
    output: Path,
    boxes: Sequence[int] = (1, 2, 3, 4),
) -> None:
    """Take a step of gradient descent on this process's share of four images; save losses, gradients and weights."""
    join(rank, world_size, meeting, args)
    device = torch.device(args.device)
    model, criterion = random_model(args, seed=rank)  # all processes then take those of the first
    model.to(device)
    parallel_model = distribute(model, device, trained_norms=False, trains=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, targets = (values[rank::world_size] for values in images_and_targets(boxes))
    size = len(images) // args.accum_steps
    batches = [
        (nested_tensor_from_tensor_list(images[i : i + size]), tuple(targets[i : i + size]))
        for i in range(0, len(images), size)
    ]
    step = Step(parallel_model, criterion, optimizer, accum_steps=args.accum_steps)
    stats = take_steps(step, batches, device, 0, Progress())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save(
        {"stats": stats, "gradients": gradients, "model": model.state_dict()}, output / f"{world_size}-{rank}.pth"
    )
    leave_process_group()
