"""What to say when the native kernels refuse a call: the words of the torch implementation where it has them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError, KvpassError
from kvpass.kernels.index_checks import check_indices
from kvpass.kernels.step_layout import check_step

OUT_OF_MEMORY = 8  # of Status in call.h


def explain_attention(
    op: str,
    query: Tensor,
    key_cache: Tensor,
    step: tuple[Tensor, Tensor, Tensor],
    features: tuple[Any, ...],
    shared: tuple[Tensor, Tensor] | None,
    wide_blocks: int | None = None,
) -> KvpassError | MemoryError:
    """The error for a call of an attention op that its kernel refused."""
    tables, lens, starts = step
    _, _, window, _, _, bias, chunk, tree = features
    length, size = lens.tolist(), key_cache.shape[2]
    first = starts.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(first)]
    try:
        check_step(length, first, counts, tables.shape[1] * size)
        if first[-1] != len(query):
            return InputError(f"query has {len(query)} rows, but query_start ends at {first[-1]}")
        if tree is not None and max(counts, default=0) > tree.shape[1]:
            return InputError(
                f"tree_mask has {tree.shape[1]} columns, but a sequence has {max(counts)} tokens in this step"
            )
        arguments = {"query": query, "key_cache": key_cache, "block_tables": tables, "seq_lens": lens}
        arguments |= {"query_start": starts, "window": window, "chunk": chunk, "tree_mask": tree}
        if shared is not None:
            arguments |= {"shared_start": shared[0], "shared_lens": shared[1]}
        check_indices(op, arguments, wide_blocks)
    except InputError as error:
        return error
    if bias is not None:
        longest = max((n for n, count in zip(length, counts, strict=True) if count), default=0)
        reach = [longest] if bias.dim() == 3 else [n for n in (longest, window, chunk) if n is not None]
        if min(reach) > bias.shape[-1]:
            covered = f"the bias covers {bias.shape[-1]} tokens"
            return InputError(f"{covered}, but the step needs {min(reach)}: shorten the sequences")
    return MemoryError(f"kvpass::{op}: no memory for its work space")


def explain_write(op: str, status: int, slots: Tensor, room: int, shift: int = 0) -> InputError | MemoryError:
    """The error for a write that was refused; nothing has been written. ``shift`` was added to the caller's slots."""
    if status == OUT_OF_MEMORY:
        return MemoryError(f"kvpass::{op}: no memory for its work space")
    wrong = slots[(slots < 0) | (slots >= room)]
    return InputError(
        f"kvpass::{op}: slot_mapping holds {int(wrong[0]) - shift}, permitted are {-shift} to {room - 1 - shift}"
    )


def explain_settle(status: int, source: Tensor, target: Tensor, blocks: int, wide: int) -> InputError | MemoryError:
    """The error for blocks that could not be settled; none has been."""
    if status == OUT_OF_MEMORY:
        return MemoryError("kvpass::settle_blocks: no memory for its work space")
    for name, found, first, last in (("source", source, -wide, -1), ("target", target, 0, blocks - 1)):
        wrong = found[(found < first) | (found > last)]
        if len(wrong):
            return InputError(
                f"kvpass::settle_blocks: {name} holds {int(wrong[0])}, permitted are {first} to {last} here"
            )
    return InputError("kvpass::settle_blocks: source and target were changed during the call")


def explain_copy(status: int, source: Tensor, target: Tensor, blocks: int) -> InputError | MemoryError:
    """The error for a copy that was refused; nothing has been copied."""
    if status == OUT_OF_MEMORY:
        return MemoryError("kvpass::copy_blocks: no memory for its work space")
    for name, found in (("source", source), ("target", target)):
        wrong = found[(found < 0) | (found >= blocks)]
        if len(wrong):
            return InputError(f"kvpass::copy_blocks: {name} holds {int(wrong[0])}, permitted are 0 to {blocks - 1}")
    return InputError("kvpass::copy_blocks: source and target were changed during the call")


def explain_gather(status: int, tables: Tensor, lens: Tensor, blocks: range, size: int) -> InputError | MemoryError:
    """The error for a gather that was refused."""
    if status == OUT_OF_MEMORY:
        return MemoryError("kvpass::gather_cache: no memory for its work space")
    found = tables[torch.arange(tables.shape[1]) * size < lens[:, None]]
    wrong = found[(found < blocks.start) | (found >= blocks.stop)]
    return InputError(
        f"kvpass::gather_cache: block_tables holds {int(wrong[0])}, permitted are {blocks.start} to {blocks.stop - 1}"
    )
