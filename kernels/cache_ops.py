"""What the ops that fill, move and read back caches take, mean and give: docstrings, checks and shape functions.

Caches are ``[B, Hkv, P, W]`` in a format of :mod:`kvpass.kernels.formats.cache_formats`, contiguous; a format's name
may be left out for the float formats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.kernels.call_checks import check_floats, check_rank, check_sizes, check_whole, find_form, find_pair
from kvpass.kernels.formats.cache_formats import find_format


def fake_write_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_format: str | None = None,
    value_format: str | None = None,
) -> None:
    """Store the keys and values of T tokens in the formats of the caches.

    Args:
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, Dv]``; Dv is 0 where values are part of the keys.
        key_cache: ``[B, Hkv, P, W]``, contiguous; written.
        value_cache: ``[B, Hkv, P, Wv]``, contiguous; written.
        slot_mapping: int64 ``[T]``, ``block * P + offset`` of each token, all different.
        key_format: name of the format of ``key_cache``.
        value_format: name of the format of ``value_cache``.

    In k4v2 all slots are of wide blocks, and so negative.
    """
    check_rank("[T, Hkv, D]", key=key, value=value)
    check_rank("[T]", slot_mapping=slot_mapping)
    check_floats(key=key, value=value)
    forms = find_pair(key_cache, value_cache, key_format, value_format)
    for new, cache, form in ((key, key_cache, forms[0]), (value, value_cache, forms[1])):
        shape = (cache.shape[1], form.row_width(cache.shape[3]))
        torch._check(
            new.shape[1:] == shape,
            lambda: f"cannot write {tuple(new.shape)} into a cache of heads and dims {shape}",  # noqa: B023
        )
    check_sizes(
        "slot_mapping, key and value have one row per token", slot_mapping.shape[0], key.shape[0], value.shape[0]
    )
    check_whole(slot_mapping=slot_mapping)


def fake_norm_rotary_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool = False,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, and store keys and values: what stands before an attention, in one pass.

    First the RMS norm of each head, ``x / sqrt(mean(x * x) + eps) * weight``, of queries and of keys where a weight is
    given. Then ``x * cos + turn(x) * sin`` over the first Dr dims, where ``turn`` gives ``(-x2, x1)`` of the two halves
    ``x1, x2``, or if interleaved of each pair of neighbours; the other dims stay. All in float32, without rounding to
    the inputs' dtype in between. Then the keys and values are stored as by ``write_cache``.

    Args:
        query: ``[T, Hq, D]``.
        key: ``[T, Hkv, D]``; this and the next four as in ``write_cache``.
        value: ``[T, Hkv, Dv]``.
        key_cache: ``[B, Hkv, P, W]``, contiguous; written.
        value_cache: ``[B, Hkv, P, Wv]``, contiguous; written.
        slot_mapping: int64 ``[T]``.
        query_weight: ``[D]``, or None for no norm of the queries.
        key_weight: ``[D]``, or None for no norm of the keys.
        eps: added to the mean square.
        cos: float32 ``[T, Dr]`` with an even Dr of at most D, or None (with ``sin``) for no rotation.
        sin: float32 ``[T, Dr]``.
        interleaved: neighbours are rotated against each other, not the two halves.
        key_format: name of the format of ``key_cache``.
        value_format: name of the format of ``value_cache``.

    Returns:
        the query after norm and rotation, ``[T, Hq, D]`` in its dtype, a new tensor.
    """
    fake_write_cache(key, value, key_cache, value_cache, slot_mapping, key_format, value_format)
    check_rank("[T, Hq, D]", query=query)
    check_rank("[T, Dr]", cos=cos, sin=sin)
    check_floats(query=query, query_weight=query_weight, key_weight=key_weight, cos=cos, sin=sin)
    width = query.shape[2]
    torch._check(key.shape[2] == width, lambda: f"query has head dim {width}, key {key.shape[2]}")
    check_sizes("query and key have one row per token", query.shape[0], key.shape[0])
    torch._check((cos is None) == (sin is None), lambda: "cos and sin are given together or not at all")
    if cos is not None and sin is not None:
        check_sizes("cos and query have one row per token", cos.shape[0], query.shape[0])
        shape = tuple(cos.shape)
        torch._check(
            shape == tuple(sin.shape) and shape[1] % 2 == 0 and shape[1] <= width,
            lambda: f"cos {shape} and sin {tuple(sin.shape)} must be [T, Dr] with an even Dr of at most {width}",
        )
    for weight in (query_weight, key_weight):
        if weight is not None:
            torch._check(weight.numel() == width, lambda: f"a norm weight of a head dim of {width} has {width} entries")
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def fake_copy_blocks(caches: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """Copy whole blocks within caches: block ``source[i]`` to block ``target[i]``, in every tensor.

    All blocks are read before any is written, so blocks may be moved about and exchanged.

    Args:
        caches: tensors ``[B, ...]`` of any dtypes, contiguous; written.
        source: int64 ``[M]``.
        target: int64 ``[M]``, all different.
    """
    check_rank("[M]", source=source, target=target)
    check_whole(source=source, target=target)
    torch._check(
        source.shape == target.shape, lambda: f"{source.shape[0]} source blocks for {target.shape[0]} target blocks"
    )


def fake_settle_blocks(caches: Sequence[Tensor], formats: Sequence[str], source: Tensor, target: Tensor) -> None:
    """Copy whole blocks, as ``copy_blocks`` does, within caches of settling formats.

    A wide block that is copied to a narrow one is quantised, and a narrow one that is copied to a wide one is brought
    back to what it stands for; see :mod:`kvpass.kernels.formats.settling`.

    Args:
        caches: tensors ``[B, Hkv, P, W]``, contiguous; written.
        formats: the name of the format of each.
        source: int64 ``[M]``, numbers of wide blocks negative.
        target: int64 ``[M]``, all different.
    """
    check_sizes("there is a format for each cache", len(formats), len(caches))
    for number, (cache, name) in enumerate(zip(caches, formats, strict=True)):
        torch._check(find_format(name).settles is not None, lambda: f"{name} does not settle: use copy_blocks")  # noqa: B023
        find_form(f"caches[{number}]", cache, name)
    check_rank("[M]", source=source, target=target)
    check_whole(source=source, target=target)
    check_sizes("there is a source for each target", source.shape[0], target.shape[0])


def fake_gather_cache(
    cache: Tensor, block_tables: Tensor, seq_lens: Tensor, width: int, format: str | None = None
) -> Tensor:
    """Read back what caches hold for each sequence.

    Args:
        cache: ``[B, Hkv, P, W]``, contiguous.
        block_tables: int64 ``[N, W]``; entries past a sequence's end may hold anything.
        seq_lens: int64 ``[N]``.
        width: numbers D of a row.
        format: name of the format of ``cache``.

    Returns:
        float32 ``[N, W * P, Hkv, D]``, zeros past the end of each sequence.
    """
    stored = find_form("cache", cache, format).row_width(cache.shape[3])
    torch._check(stored == width, lambda: f"width={width} was asked of a cache with rows of {stored} numbers")
    check_rank("[N, W]", block_tables=block_tables)
    check_rank("[N]", seq_lens=seq_lens)
    check_sizes("block_tables and seq_lens have a row per sequence", block_tables.shape[0], seq_lens.shape[0])
    check_whole(block_tables=block_tables, seq_lens=seq_lens)
    slots = block_tables.shape[1] * cache.shape[2]
    return cache.new_empty(block_tables.shape[0], slots, cache.shape[1], width, dtype=torch.float32)
