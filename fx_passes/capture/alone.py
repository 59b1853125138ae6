"""One capture at a time: torch.export replaces functions of torch for every thread of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules import transformer

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Keep other threads from capturing, and from running a model that is being compiled, meanwhile."""
    with _LOCK:
        yield


@contextmanager
def plain_attention_modules() -> Iterator[None]:
    """Let torch's own attention modules spell out what they do; to be entered :func:`alone`.

    nn.MultiheadAttention keeps from its fused fast path, one opaque op. nn.TransformerEncoder and nn.TransformerDecoder
    look at the values of a mask to tell whether it is causal, which no capture can: they take it as it stands, unless
    they were told.
    """
    fast, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = _as_told
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = detect


def _as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
