"""Conditions under which faster operators, or the reuse of memory, would change results or fail."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_transformed() -> bool:
    """Return whether a transform of torch.func, such as `vmap` or `grad`, is active."""
    return torch._C._functorch.maybe_current_level() is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks, which may keep activations, are called for this module or a module in it."""
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def needs_gradients(*tensors: Tensor) -> bool:
    """Return whether a result that is computed from these tensors needs gradients."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def needs_only_values(*tensors: Tensor) -> bool:
    """Return whether operators on these tensors only have to compute values.

    Operators that replace PyTorch's own for speed have no gradients; forward derivatives would silently be zero. Tools
    that inspect operators (tracers, compilers, fake tensors, counters of FLOPs) and torch.func's transforms do not know
    them.
    """
    if needs_gradients(*tensors):
        return False
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    return not is_transformed() and forward_ad._current_level < 0


def onednn_supports(x: Tensor, *others: Tensor) -> bool:
    """Return whether oneDNN, which computes on CPUs, supports the devices of these tensors and the precision of `x`."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if any(tensor.device.type != "cpu" for tensor in (x, *others)):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and onednn_supports_bfloat16())


@cache
def onednn_supports_bfloat16() -> bool:
    """Return whether this CPU supports bfloat16 in oneDNN."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
