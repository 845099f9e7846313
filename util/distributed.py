"""The process group: joining it, and communication between the processes.

Nothing from the network is unpickled: numbers are sent as tensors, everything else as JSON text in tensors.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import launcher
from util.errors import InputError, reason
from util.text import counted


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def is_first_of_node() -> bool:
    """Return whether this is the first process of its machine, which downloads files for all of them."""
    return launcher.number("LOCAL_RANK", launcher.number("SLURM_LOCALID", 0)) == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_dist_avail_and_initialized():
        dist.barrier()


def leave_process_group(orderly: bool = True) -> None:
    """Leave the process group that `init_distributed_mode` has joined.

    After an error (`orderly` is False), NCCL might wait for processes that are gone: its group ends with this process.
    """
    if not is_dist_avail_and_initialized():
        return
    if dist.get_backend() == "gloo":
        # Before torch 2.8, destroying a group waits for gloo's threads while it holds Python's lock (GIL), which such a
        # thread may need to free a tensor. Destroying a backend releases the lock; the reference makes this come last.
        assert dist.group.WORLD is not None
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()
        del backend
    elif orderly:
        dist.destroy_process_group()


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the process group that environment variables of torchrun, torch.distributed.launch or srun describe.

    Set `args.rank`, `args.world_size`, `args.gpu` (the local rank) and `args.distributed`. Without a launcher, there is
    no group and `args.distributed` is False.

    Raise InputError if an environment variable is missing or not a number, if the local rank has no GPU of its
    own while `args.device` is CUDA, or if the processes cannot connect.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        args.rank, args.world_size = launcher.rank_and_size("RANK", "WORLD_SIZE")
        args.gpu = launcher.number("LOCAL_RANK", args.local_rank or 0)
    elif launcher.number("SLURM_STEP_NUM_TASKS", 1) > 1:  # set by srun for its tasks, not in an interactive shell
        args.rank, args.world_size = launcher.rank_and_size("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        args.gpu = launcher.number("SLURM_LOCALID", 0)
        env.setdefault("MASTER_ADDR", first_slurm_node(launcher.text("SLURM_STEP_NODELIST")))
        env.setdefault("MASTER_PORT", str(20_000 + launcher.number("SLURM_JOB_ID", 0, most=2**63) % 20_000))
    else:
        args.rank, args.world_size, args.gpu, args.distributed = 0, 1, 0, False
        return

    args.distributed = True
    if args.dist_url == "env://":
        launcher.text("MASTER_ADDR")
        launcher.number("MASTER_PORT", least=1, most=2**16 - 1)
    on_cuda = torch.device(args.device).type == "cuda"
    if on_cuda:
        if args.gpu >= torch.cuda.device_count():
            raise InputError(
                f"process {args.gpu} of this node has no GPU: torch sees {counted(torch.cuda.device_count(), 'GPU')}; "
                "start one process per GPU, or pass --device cpu"
            )
        torch.cuda.set_device(args.gpu)
    try:
        join_process_group(args, on_cuda)
    except (RuntimeError, ValueError) as error:  # ValueError: not an address
        address = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}" if args.dist_url == "env://" else args.dist_url
        raise InputError(
            f"process {args.rank} cannot connect to the other processes at {address} ({reason(error)}); "
            "check MASTER_ADDR and MASTER_PORT, and that all processes are running"
        ) from error


def join_process_group(args: argparse.Namespace, on_cuda: bool) -> None:
    """Join the other processes at `args.dist_url`, and wait until all have joined."""
    env = os.environ
    store, *_ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size))
    if env.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store survives a restart, with the old addresses
        store = dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=store,
        world_size=args.world_size,
        rank=args.rank,
        device_id=torch.device("cuda", args.gpu) if on_cuda else None,
    )
    barrier()


def first_slurm_node(nodes: str) -> str:
    """Return the first host of SLURM's compressed list, such as "gpu03" for "gpu[03-05,9],login1"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if not match:
        raise InputError(
            f"the environment variable SLURM_STEP_NODELIST is {launcher.short(nodes)}: names no node; {launcher.ADVICE}"
        )
    return match[1] + (match[2] or "")


def distribute(model: nn.Module, device: torch.device, trained_norms: bool, trains: bool) -> nn.Module:
    """Wrap a model for several processes, which all get the first one's state; return it unchanged for one process.

    Args:
        device: the device of the model; if it is a GPU, the current one.
        trained_norms: batch norms are trained; on GPUs, they use the images of all processes (torch cannot on CPUs).
        trains: gradients will be computed.
    """
    if not is_dist_avail_and_initialized():
        return model
    on_cuda = device.type == "cuda"
    if trained_norms and on_cuda:
        detector: Any = model.detector
        detector.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(detector.backbone)
    device_ids = [torch.cuda.current_device()] if on_cuda else None
    broadcast_state(model)
    # Keep running statistics equal in every step; the argument's name differs between versions of torch. Without it,
    # DistributedDataParallel may not even send the buffers when it is constructed, so `broadcast_state` has done so.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {sync_buffers: trained_norms}
    parallel_model = DistributedDataParallel(model, device_ids=device_ids, **settings)
    if trains:
        settle_buckets(parallel_model)
    return parallel_model


def broadcast_state(model: nn.Module) -> None:
    """Copy the first process's parameters and buffers, such as the statistics of frozen norms, to all processes."""
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            shared = tensor.detach().contiguous()
            dist.broadcast(shared, 0)
            tensor.copy_(shared)


def settle_buckets(model: DistributedDataParallel) -> None:
    """Run a backward pass without a step, so that DistributedDataParallel lays out its gradient buckets again.

    The layout decides the order in which gradients are summed; a resumed run must start with the same layout as the run
    that it continues.
    """
    device = next(model.parameters()).device
    outputs = model.eval()(torch.zeros(1, 3, 64, 64, device=device))
    torch.stack([tensor.sum() for tensor in tensors_of(outputs) if tensor.requires_grad]).sum().backward()
    model.zero_grad()


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples, and those that an object's `all_tensors` yields."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif hasattr(outputs, "all_tensors"):
        yield from outputs.all_tensors()
    elif isinstance(outputs, dict | list | tuple):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors_of(value)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order, from [N_rank, ...] on each to [sum of N_rank, ...] on all.

    The processes may hold different numbers of rows; dtype and the other sizes are the same on all.
    """
    if get_world_size() == 1:
        return rows
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    of_ranks = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(get_world_size())]
    dist.all_gather(of_ranks, torch.tensor([len(rows)], device=device))
    counts = [int(count) for count in of_ranks]
    padded = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).to(rows.device)


def all_gather_plain(value: Any) -> list[Any]:
    """Gather a value from each process, in rank order, on all of them.

    Values must be valid JSON: numbers (floats arrive bit for bit), texts, lists and dicts with texts as keys.
    """
    line = torch.frombuffer(bytearray(json.dumps(value) + "\n", "ascii"), dtype=torch.uint8)
    return [json.loads(text) for text in bytes(all_gather_rows(line).tolist()).splitlines()]


def broadcast_bytes(value: bytes) -> bytes:
    """Return the first process's value on all processes."""
    if get_world_size() == 1:
        return value
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    length = torch.tensor([len(value)], device=device)
    dist.broadcast(length, 0)
    own = torch.frombuffer(bytearray(value), dtype=torch.uint8) if is_main_process() else None
    content = torch.empty(int(length), dtype=torch.uint8, device=device) if own is None else own.to(device)
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes()


def reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on all of them."""
    if get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Return the mean (or sum) over all processes of a dict of scalars, which has the same keys on each."""
    if get_world_size() == 1 or not values:
        return values
    names = sorted(values)
    total = reduce_sum(torch.stack([values[name].detach() for name in names]))
    if average:
        total = total / get_world_size()
    return dict(zip(names, total, strict=True))
