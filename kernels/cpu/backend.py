"""The ops on native CPU kernels; a row of :data:`kvpass.kernels.backends.BACKENDS`."""

from __future__ import annotations

from typing import Any

import torch

from kvpass.kernels.cpu import loader
from kvpass.kernels.cpu.attention_calls import (
    cascade_attention,
    latent_attention,
    paged_attention,
    paged_attention_stats,
)
from kvpass.kernels.cpu.cache_calls import copy_blocks, gather_cache, norm_rotary_write, settle_blocks, write_cache
from kvpass.kernels.cpu.packing import CODES_BY_DTYPE, FLOATS
from kvpass.kernels.formats.cache_formats import FORMATS

__all__ = (
    "available",
    "cascade_attention",
    "copy_blocks",
    "gather_cache",
    "latent_attention",
    "norm_rotary_write",
    "paged_attention",
    "paged_attention_stats",
    "settle_blocks",
    "unsupported",
    "why_unavailable",
    "write_cache",
)


def available() -> bool:
    """Whether a native object was built and runs here."""
    return loader.current() is not None


def why_unavailable() -> str:
    """What :func:`available` found missing."""
    return loader.why_missing()


def unsupported(op: str, **arguments: Any) -> str | None:
    """Why the kernels cannot serve a call of ``op``, or None."""
    if op in ("copy_blocks", "settle_blocks"):
        return None if all(cache.is_contiguous() for cache in arguments["caches"]) else "a cache is not contiguous"
    for name in ("query", "key", "value"):
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}: permitted are torch.float32, torch.bfloat16 and torch.float16"
    for name in ("key_cache", "value_cache", "cache"):
        cache = arguments.get(name)
        if cache is None:
            continue
        if cache.dtype not in CODES_BY_DTYPE and cache.dtype is not torch.uint8:
            return f"{name} is {cache.dtype}: permitted are the formats {', '.join(FORMATS)}"
    return None
