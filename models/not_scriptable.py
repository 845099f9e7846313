"""One-line error for torch.jit.script, which is deprecated and which the models do not support."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """Base class of modules for which torch.jit.script raises this error, also within other modules."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls this
        raise NotImplementedError(
            f"torch.jit.script is deprecated and does not support {type(self).__name__}: use torch.compile, "
            "torch.export or torch.onnx.export"
        )
