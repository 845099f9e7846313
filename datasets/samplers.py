"""Samplers: choice of the images of each batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from torch.utils.data import DistributedSampler


class EpochSampler(DistributedSampler):
    """DistributedSampler that can also start in the middle of an epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the order of an epoch, and skip the first `start` samples of this process."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


def same_shape_batches(shapes: Iterable[tuple[int, int] | None], batch_size: int) -> list[list[int]]:
    """Return batches of up to `batch_size` positions in `shapes`: each position once, and one shape per batch.

    An image of unknown shape, None, is a batch of its own. Batches of one shape need no padding, on which predictions
    would slightly depend. Successive batches mostly have the same shape, so that the processes, which take turns,
    hardly wait for each other.
    """
    groups = defaultdict(list)
    for position, shape in enumerate(shapes):
        groups[shape or position].append(position)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
