"""The backend in plain torch: right everywhere, and quick enough to serve a processor.

Scores, softmax and the sum over values are computed in float32 (float64 for float64 queries) whatever the cache holds.
Keys and values are gathered a few mebibytes at a time and widened there, where it costs no memory traffic; a matrix
product of the G query heads that share a KV head then reads them once. See :mod:`kvpass.kernels.step_layout` for rows,
slabs and chunks.
"""

from __future__ import annotations

from kvpass.kernels.reference.cache import (
    copy_blocks,
    gather_cache,
    norm_rotary_write,
    settle_blocks,
    write_cache,
)
from kvpass.kernels.reference.dense import dense_attention
from kvpass.kernels.reference.paged import (
    cascade_attention,
    latent_attention,
    paged_attention,
    paged_attention_stats,
)
from kvpass.kernels.reference.scores import GATHER_BYTES, SCORE_BYTES

__all__ = (
    "GATHER_BYTES",
    "SCORE_BYTES",
    "available",
    "cascade_attention",
    "copy_blocks",
    "dense_attention",
    "gather_cache",
    "latent_attention",
    "norm_rotary_write",
    "paged_attention",
    "paged_attention_stats",
    "settle_blocks",
    "unsupported",
    "write_cache",
)


def available() -> bool:
    """Torch is always there."""
    return True


def unsupported(op: str, **arguments: object) -> str | None:
    """None: this backend serves every call."""
    return None
