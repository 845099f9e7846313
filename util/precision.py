"""Numbers that keep their precision where a model computes in 16 bits."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 to float32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
