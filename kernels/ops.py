"""Schemas of the ``kvpass::`` ops, their shape functions, and their registration.

Importing this module defines the ops; importing it again, under whatever name, changes nothing. The caches are explicit
mutable arguments: a graph that holds these ops can be functionalised, exported and compiled like any other, and no
compiler may drop or reorder a write.

The ops are for inference. Under grad mode, and with parameters that require grad, they run and record nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpass.kernels import reference

SCHEMAS: dict[str, str] = {
    "dense_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, float? softcap=None,"
        " Tensor? sinks=None) -> Tensor"
    ),
    "write_cache": (
        "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping) -> ()"
    ),
    "paged_attention": (
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,"
        " Tensor query_start, float scale, float? softcap=None, int? window=None, Tensor? slopes=None,"
        " Tensor? sinks=None, Tensor? bias=None) -> Tensor"
    ),
}


def fake_dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over whole sequences: the one form into which passes rewrite every spelling of attention.

    Query head h reads KV head ``h // (Hq // Hkv)``. Scores are ``softcap * tanh(scale * q.k / softcap) + bias``, or
    ``scale * q.k + bias`` without a softcap. A sink is one more logit in the denominator, with no value. Scores and
    softmax are float32, or float64 for float64 inputs.

    Args:
        query: ``[N, Hq, Sq, D]``; Hq is a multiple of Hkv.
        key: ``[N, Hkv, Sk, D]``.
        value: ``[N, Hkv, Sk, Dv]``.
        bias: float, broadcastable to ``[N, Hq, Sq, Sk]``; ``-inf`` hides a key.
        scale: factor of ``q.k``.
        softcap: bound of the scores before the bias.
        sinks: ``[Hq]``.

    Returns:
        ``[N, Hq, Sq, Dv]`` in the query's dtype; zeros where nothing is visible.
    """
    batch, heads, rows, width = query.shape
    torch._check(key.shape[3] == width, lambda: f"query has head dim {width}, key {key.shape[3]}")
    _check_heads(heads, key.shape[1], value.shape[1])
    return query.new_empty(batch, heads, rows, value.shape[3])


def fake_write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store the keys and values of T tokens, cast to the dtypes of the caches.

    Args:
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, Dv]``.
        key_cache: ``[B, Hkv, P, D]``, contiguous; written.
        value_cache: ``[B, Hkv, P, Dv]``, contiguous; written.
        slot_mapping: int64 ``[T]``, ``block * P + offset`` of each token, all different.
    """
    for new, cache in ((key, key_cache), (value, value_cache)):
        shape = (cache.shape[1], cache.shape[3])
        torch._check(new.shape[1:] == shape, lambda: f"cannot write {new.shape} into a cache {cache.shape}")  # noqa: B023


def fake_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of one step over paged caches that already hold the step's own keys and values.

    Row ``t`` of sequence n has position ``q = seq_lens[n] - (query_start[n + 1] - query_start[n]) + t -
    query_start[n]``. It sees keys ``k <= q`` with ``q - k < window`` that the bias does not hide, with scores
    ``softcap(scale * q.k) - slopes[h] * (q - k) + bias[h, ...]``; see :class:`kvpass.types.MaskMeaning`. Scores and
    softmax are float32, or float64 for a float64 query.

    Slots past a sequence's end, and entries of its block table past its end, may hold anything. A NaN or infinity of
    a token *of the sequence* can reach the other queries of that sequence, as it does in any softmax times matrix.

    Args:
        query: ``[T, Hq, D]``; Hq is a multiple of Hkv. Query head h reads KV head ``h // (Hq // Hkv)``.
        key_cache: ``[B, Hkv, P, D]``, contiguous.
        value_cache: ``[B, Hkv, P, Dv]``, contiguous.
        block_tables: int64 ``[N, W]``.
        seq_lens: int64 ``[N]``.
        query_start: int64 ``[N + 1]``.
        scale: factor of ``q.k``.
        softcap: bound of the scores before slopes and bias.
        window: newest keys that a query sees, itself included.
        slopes: ALiBi slopes, float32 ``[Hq]``.
        sinks: ``[Hq]``, one more logit in the denominator, with no value.
        bias: ``[1 | Hq, L]`` by distance ``q - k`` or ``[1 | Hq, L, L]`` by (q, k); ``-inf`` hides a key.

    Returns:
        ``[T, Hq, Dv]`` in the query's dtype; zeros where nothing is visible.

    Raises:
        InputError: if lengths, query starts, block tables and bias do not fit each other (when run, not when traced).
    """
    tokens, heads, width = query.shape
    torch._check(key_cache.shape[3] == width, lambda: f"query has head dim {width}, key cache {key_cache.shape[3]}")
    _check_heads(heads, key_cache.shape[1], value_cache.shape[1])
    return query.new_empty(tokens, heads, value_cache.shape[3])


def _check_heads(heads: int, key_heads: int, value_heads: int) -> None:
    torch._check(
        key_heads == value_heads and heads % key_heads == 0,
        lambda: f"{heads} query heads cannot be grouped over {key_heads} key and {value_heads} value heads",
    )


def register_op(name: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define ``kvpass::name`` unless it exists; the definition lives as long as the process."""
    if hasattr(torch.ops.kvpass, name):
        return
    qualname = f"kvpass::{name}"
    torch.library.define(qualname, SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualname, "default", implementation)
    # Without this, torch would record the torch calls inside the op, and a written cache would come to require grad.
    torch.library.impl(qualname, "Autograd", torch.library.fallthrough_kernel)
    torch.library.register_fake(qualname, fake)


register_op("dense_attention", reference.dense_attention, fake_dense_attention)
register_op("write_cache", reference.write_cache, fake_write_cache)
register_op("paged_attention", reference.paged_attention, fake_paged_attention)
