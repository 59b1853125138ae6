"""What is checked of every call, whatever backend serves it: ranks, dtypes, and sizes that have to fit each other.

Kernels work on bare memory and rely on it. What the numbers in index tensors say is checked where they are read, and in
debug mode by :mod:`kvpass.kernels.index_checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import ConfigError, InputError
from kvpass.kernels.formats.cache_formats import CHANNEL_GROUP, CacheFormat, format_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CACHE_DIMS = "[B, Hkv, P, W]"
CACHES = ("key_cache", "value_cache", "cache")


def check_rank(dims: str, **tensors: Tensor | None) -> None:
    """Complain unless these tensors have as many dims as ``dims`` names."""
    for name, tensor in tensors.items():
        if tensor is not None:
            torch._check(
                tensor.dim() == dims.count(",") + 1,
                lambda: f"{name} has {tensor.dim()} dims: it must be {dims}",  # noqa: B023
            )


def check_floats(**tensors: Tensor | None) -> None:
    """Complain unless these tensors are of a dtype that ops compute with; torch alone takes float64."""
    for name, tensor in tensors.items():
        if tensor is not None:
            torch._check(
                tensor.dtype in FLOATS,
                lambda: f"{name} is {tensor.dtype}: permitted are {', '.join(map(str, FLOATS))}",  # noqa: B023
            )


def check_whole(**indices: Tensor) -> None:
    """Complain unless all of these tensors are int64."""
    for name, tensor in indices.items():
        torch._check(
            tensor.dtype is torch.int64,
            lambda: f"{name} is {tensor.dtype}: it must be torch.int64",  # noqa: B023
        )


def check_sizes(rule: str, *sizes: int) -> None:
    """Complain unless sizes that ``rule`` says are equal are so. While tracing, symbols may stand for what only the
    caller knows to be equal: those pass."""
    if all(isinstance(size, int) for size in sizes):
        torch._check(len(set(sizes)) <= 1, lambda: f"{rule}, but there are {', '.join(map(str, sizes))}")


def find_form(argument: str, cache: Tensor, name: str | None) -> CacheFormat:
    """The format of the cache ``argument``, or an error that names it."""
    check_rank(CACHE_DIMS, **{argument: cache})
    try:
        return format_of(cache, name)
    except (ConfigError, InputError) as error:
        raise type(error)(f"{argument}: {error}") from None


def find_pair(
    key_cache: Tensor, value_cache: Tensor, key_format: str | None, value_format: str | None
) -> tuple[CacheFormat, CacheFormat]:
    """The formats of keys and values, which must be made of the same blocks and both settle or neither."""
    keys, values = find_form("key_cache", key_cache, key_format), find_form("value_cache", value_cache, value_format)
    torch._check(
        (keys.settles, values.settles) in ((None, None), ("key", "value")),
        lambda: (
            f"formats {key_format} and {value_format}: k4 is for keys, v2 for values, and neither goes without the "
            "other"
        ),
    )
    size = key_cache.shape[2]
    if keys.settles is None:
        check_sizes("key_cache and value_cache have the same blocks", key_cache.shape[0], value_cache.shape[0])
    else:
        torch._check(size % CHANNEL_GROUP == 0, lambda: f"k4v2 needs blocks of 16, 32, 48.. tokens, not of {size}")
    check_sizes("key_cache and value_cache have the same block size", size, value_cache.shape[2])
    return keys, values


def check_step(block_tables: Tensor, seq_lens: Tensor, query_start: Tensor) -> None:
    """Complain unless the tensors of a step are int64 and have a row per sequence."""
    check_rank("[N, W]", block_tables=block_tables)
    check_rank("[N]", seq_lens=seq_lens)
    check_rank("[N + 1]", query_start=query_start)
    sequences = block_tables.shape[0]
    check_sizes("block_tables and seq_lens have a row per sequence", sequences, seq_lens.shape[0])
    check_sizes("query_start has a row per sequence and one more", sequences, query_start.shape[0] - 1)
    check_whole(block_tables=block_tables, seq_lens=seq_lens, query_start=query_start)


def check_features(
    heads: int,
    softcap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    chunk: int | None,
) -> None:
    """Complain of features that no attention with so many query heads can have."""
    check_floats(slopes=slopes, sinks=sinks, bias=bias)
    torch._check(softcap is None or abs(softcap) > 0, lambda: f"softcap={softcap} must be a number other than 0")
    torch._check(chunk is None or chunk >= 1, lambda: f"chunk={chunk} must be at least 1")
    for name, vector in (("slopes", slopes), ("sinks", sinks)):
        if vector is not None:
            torch._check(
                vector.dim() == 1 and vector.shape[0] == heads,
                lambda: f"{name} is {tuple(vector.shape)}: it must hold one number per query head, ({heads},)",  # noqa: B023
            )
    if bias is not None:
        torch._check(
            bias.dim() in (2, 3) and (bias.shape[0] == 1 or bias.shape[0] == heads),
            lambda: f"bias is {tuple(bias.shape)}: permitted are [1 | {heads}, L] and [1 | {heads}, L, L]",
        )
        check_sizes("a bias by (query, key) is square", *bias.shape[1:])


def check_tree(tree_mask: Tensor | None, tokens: int) -> None:
    """Complain unless a tree mask, if there is one, is a boolean table with a row per token."""
    if tree_mask is not None:
        check_rank("[T, M]", tree_mask=tree_mask)
        torch._check(tree_mask.dtype is torch.bool, lambda: f"tree_mask is {tree_mask.dtype}: it must be torch.bool")
        check_sizes("tree_mask and query have one row per token", tree_mask.shape[0], tokens)


def check_heads(heads: int, key_heads: int, value_heads: int) -> None:
    """Complain unless query heads can be grouped over those of the cache."""
    torch._check(
        key_heads == value_heads and heads % key_heads == 0,
        lambda: f"{heads} query heads cannot be grouped over {key_heads} key and {value_heads} value heads",
    )


def check_memory(arguments: Mapping[str, Any]) -> None:
    """Complain unless all tensors are on one device, and caches contiguous; of real tensors only.

    Args:
        arguments: of a call, by name.

    Raises:
        InputError: naming the argument.
    """
    first: tuple[str, torch.device] | None = None
    for name, value in arguments.items():
        parts: Sequence[Any] = value if isinstance(value, (list, tuple)) else (value,)
        for tensor in parts:
            if not isinstance(tensor, Tensor):
                continue
            first = first or (name, tensor.device)
            if tensor.device != first[1]:
                raise InputError(f"{name} is on {tensor.device}; it must be on {first[1]}, where {first[0]} is")
        if name in CACHES and not value.is_contiguous():
            raise InputError(f"{name} has strides {value.stride()}: it must be contiguous")
