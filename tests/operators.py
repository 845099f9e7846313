"""Recorder of the operators that PyTorch computes."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Mode that records operators, their arguments and the sizes of their results: `with Recorder() as recorder`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, dict]] = []
        self.largest = 0  # elements of the largest result
        self.largest_bytes = 0
        self.written = 0  # elements of all results, except those that share the memory of an argument

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func.overloadpacket.__name__, args, kwargs))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            self.largest = max(self.largest, tensor.numel())
            self.largest_bytes = max(self.largest_bytes, tensor.numel() * tensor.element_size())
            self.written += tensor.numel() * (tensor.untyped_storage()._cdata not in given)
        return result

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]

    def count_waits(self) -> int:
        """Count the operators that make the host wait for a GPU, to read a value or a size that depends on values."""
        by_mask = [
            name
            for name, args, _ in self.calls
            if name.startswith("index")
            and any(t.dtype is torch.bool for t in tree_leaves(args[1]) if torch.is_tensor(t))
        ]
        return len(by_mask) + sum(self.names.count(n) for n in ("_local_scalar_dense", "nonzero", "masked_select"))
