"""Debug mode: no index that an op is given may lead out of its tensors. It costs a look at every index.

Without it an index out of range is the caller's fault and may be read or written through, as in any paged kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.formats.settling import wide_view


def check_indices(op: str, arguments: dict[str, Any], wide_blocks: int | None = None) -> None:
    """Check every index of a call of ``kvpass::op``.

    Args:
        op: its name.
        arguments: by name.
        wide_blocks: of caches that settle the wide blocks that fit, where the caller knows; None otherwise.

    Raises:
        InputError: naming the op, the argument, what was found and what is permitted.
    """
    cache = arguments.get("key_cache", arguments.get("cache"))
    if isinstance(cache, Tensor) and "slot_mapping" in arguments:
        wide = count_wide_blocks(arguments)
        first, stop = (-wide, 0) if wide is not None else (0, cache.shape[0])
        _check_range(op, "slot_mapping", arguments["slot_mapping"], first * cache.shape[2], stop * cache.shape[2] - 1)
        _check_different(op, "slot_mapping", arguments["slot_mapping"])
    if isinstance(cache, Tensor) and "block_tables" in arguments:
        tables, lens = arguments["block_tables"], arguments["seq_lens"]
        _check_range(op, "seq_lens", lens, 0, tables.shape[1] * cache.shape[2])
        used = torch.arange(tables.shape[1], device=tables.device) * cache.shape[2] < lens[:, None]
        if "query_start" in arguments:
            used &= _seen(op, arguments, cache.shape[2])
        _check_range(
            op, "block_tables", tables[used], -(wide_blocks or count_wide_blocks(arguments) or 0), cache.shape[0] - 1
        )
    if op == "settle_blocks":
        _check_settled(op, arguments)
    if "shared_lens" in arguments:
        _check_shared(op, arguments, arguments["key_cache"].shape[2])
    if op == "copy_blocks":
        blocks = min((tensor.shape[0] for tensor in arguments["caches"]), default=0)
        _check_range(op, "source", arguments["source"], 0, blocks - 1)
        _check_range(op, "target", arguments["target"], 0, blocks - 1)
        _check_different(op, "target", arguments["target"])


def _seen(op: str, arguments: dict[str, Any], size: int) -> Tensor:
    """bool ``[N, W]``: blocks that a row of this step can see; those that a window has passed may be forgotten."""
    tables, lens, starts = (arguments[name] for name in ("block_tables", "seq_lens", "query_start"))
    counts = starts.diff()
    tokens = arguments["query"].shape[0]
    if starts.shape[0] != lens.shape[0] + 1 or int(starts[0]) != 0 or int(starts[-1]) != tokens:
        raise InputError(
            f"kvpass::{op}: query_start={starts.tolist()} must hold {lens.shape[0] + 1} rows from 0 to {tokens}"
        )
    if ((counts < 0) | (counts > lens)).any():
        raise InputError(f"kvpass::{op}: query_start={starts.tolist()} gives a sequence less than 0 or more new tokens "
                         f"than its seq_lens={lens.tolist()}")  # fmt: skip
    oldest = lens - counts
    if arguments.get("tree_mask") is not None:
        oldest = (oldest - 1).clamp(min=0)
    first = torch.zeros_like(oldest)
    if arguments.get("window") is not None:
        first = torch.maximum(first, oldest - arguments["window"] + 1)
    if arguments.get("chunk") is not None:
        first = torch.maximum(first, oldest // arguments["chunk"] * arguments["chunk"])
    end = torch.arange(1, tables.shape[1] + 1, device=tables.device) * size
    return (end > first[:, None]).logical_and((counts > 0)[:, None])


def _check_settled(op: str, arguments: dict[str, Any]) -> None:
    """Numbers of blocks are those of narrow and of wide blocks that every cache has room for."""
    caches, forms = arguments["caches"], [FORMATS[name] for name in arguments["formats"]]
    wide = min((len(wide_view(cache, form)) for cache, form in zip(caches, forms, strict=True)), default=0)
    blocks = min((len(cache) for cache in caches), default=0)
    for name in ("source", "target"):
        _check_range(op, name, arguments[name], -wide, blocks - 1)
    _check_different(op, "target", arguments["target"])


def count_wide_blocks(arguments: dict[str, Any]) -> int | None:
    """Wide blocks that fit into the caches of a call, if it names settling formats; None otherwise."""
    found = None
    for cache, name in (("key_cache", "key_format"), ("value_cache", "value_format"), ("cache", "format")):
        form = FORMATS.get(arguments.get(name) or "")
        if form is not None and form.settles is not None:
            count = len(wide_view(arguments[cache], form))
            found = count if found is None else min(found, count)
    return found


def _check_shared(op: str, arguments: dict[str, Any], size: int) -> None:
    starts, shared = arguments["shared_start"].tolist(), arguments["shared_lens"].tolist()
    tables, sequences = arguments["block_tables"], arguments["seq_lens"].shape[0]
    old = (arguments["seq_lens"] - arguments["query_start"].diff()).tolist()
    if starts[0] != 0 or starts[-1] != sequences or starts != sorted(starts):
        raise InputError(f"kvpass::{op}: shared_start={starts} must rise from 0 to {sequences}")
    for g, length in enumerate(shared):
        members = range(starts[g], starts[g + 1])
        most = min((old[n] for n in members), default=0)
        if length % size or not 0 <= length <= most:
            raise InputError(
                f"kvpass::{op}: shared_lens[{g}]={length} must be a multiple of {size}, and at most the {most} earlier "
                "tokens of each sequence of the group"
            )
        rows = tables[starts[g] : starts[g + 1], : length // size]
        if len(rows) and (rows != rows[0]).any():
            raise InputError(f"kvpass::{op}: block_tables of group {g} differ within its {length} shared tokens")


def _check_range(op: str, argument: str, found: Tensor, low: int, high: int) -> None:
    wrong = found[(found < low) | (found > high)]
    if len(wrong):
        raise InputError(f"kvpass::{op}: {argument} holds {int(wrong[0])}, permitted are {low} to {high}")


def _check_different(op: str, argument: str, found: Tensor) -> None:
    values, counts = found.unique(return_counts=True)
    if (counts > 1).any():
        raise InputError(f"kvpass::{op}: {argument} holds {int(values[counts > 1][0])} twice, all must differ")
