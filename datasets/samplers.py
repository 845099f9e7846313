"""Which images make a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from torch.utils.data import DistributedSampler


class EpochSampler(DistributedSampler):
    """DistributedSampler, which can also begin within an epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the order, and how many of this process's samples are passed over."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


def same_shape_batches(shapes: Iterable[tuple[int, int] | None], batch_size: int) -> list[list[int]]:
    """Batches of up to `batch_size` positions of `shapes`, each once, none with two shapes; one of None stays alone.

    A batch of one shape needs no padding, on which predictions would depend a little. Neighbouring batches have the
    same shape, so that processes to which they are dealt in turn wait little for each other.
    """
    groups = defaultdict(list)
    for position, shape in enumerate(shapes):
        groups[shape or position].append(position)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
