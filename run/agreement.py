"""Agreement of all processes on yes-or-no questions about a step, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from util.distributed import reduce_sum


class Agreement:
    """Agreement of all processes on yes-or-no questions: the common answer is yes if any process says yes.

    Reading a tensor on a GPU makes the host wait for it. The device therefore uses the answers at once, and the host
    reads them one step later, when the matching has just waited for the device anyway.
    """

    def __init__(self) -> None:
        self.answers = torch.zeros(0)  # on the host after the event `copied`
        self.copied: torch.cuda.Event | None = None

    def reach(self, *answers: Tensor) -> Tensor:
        """Return the common answers as a float tensor [N] of zeros and ones on the device; `answers` are N bools []."""
        common = reduce_sum(torch.stack(answers).float()).clamp(max=1)
        self.answers, self.copied = common, None
        if common.is_cuda:
            self.answers = torch.empty_like(common, device="cpu", pin_memory=True)
            self.answers.copy_(common, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        return common

    def read(self) -> list[bool]:
        """Return the latest common answers."""
        if self.copied:
            self.copied.synchronize()
        return [bool(value) for value in self.answers.tolist()]
