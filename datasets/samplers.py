"""Samplers: the images that make up each batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from torch.utils.data import DistributedSampler


class EpochSampler(DistributedSampler):
    """DistributedSampler that can also start within an epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order, and how many of this process's samples are skipped."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


def same_shape_batches(shapes: Iterable[tuple[int, int] | None], batch_size: int) -> list[list[int]]:
    """Return batches of up to `batch_size` positions in `shapes`, each once and of one shape; None makes its own batch.

    A batch of one shape needs no padding, on which predictions would depend slightly. Neighbouring batches have the
    same shape, so that the processes, which take them in turn, hardly wait for each other.
    """
    groups = defaultdict(list)
    for position, shape in enumerate(shapes):
        groups[shape or position].append(position)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
