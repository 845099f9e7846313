"""A clear answer to torch.jit.script, which is deprecated and which these models do not support."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """Module that torch.jit.script refuses in one line, also as a part of another module."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls this
        raise NotImplementedError(
            f"torch.jit.script is deprecated and does not support {type(self).__name__}: use torch.compile, "
            "torch.export or torch.onnx.export"
        )
