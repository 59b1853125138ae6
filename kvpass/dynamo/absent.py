"""What stands for an output that a scope does not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError


class AbsentOutput(Tensor):
    """In the place of every output but the logits; it can be handed on, and any use of it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(
            "within a scope of kvpass the logits are computed and no other output of the model: call it outside of the "
            "scope for hidden states, losses and caches, or have the forward return the logits alone"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "AbsentOutput()"


def absent() -> AbsentOutput:
    """One of them."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(0).as_subclass(AbsentOutput)
