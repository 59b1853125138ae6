"""What random calls of the attention ops seldom meet: features that go together, and steps that have what it takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from tests.kernels.random_cases import BEYOND, Case, attention_case

Call = dict[str, Any]


def always(call: Call) -> bool:
    return True


def in_pairs(call: Call) -> bool:
    return call["bias"].dim() == 3 and int(call["seq_lens"].max()) > 20


def settled(call: Call, size: int) -> bool:
    """Whether a sequence begins with a settled block of so many tokens, of which each 16 share scales."""
    first = call["block_tables"][:, 0]
    return call["key_cache"].shape[2] == size and bool(((first >= 0) & (first < BEYOND) & seen(call)).any())


def seen(call: Call) -> Any:
    """bool ``[N]``: sequences whose first block is full, and seen by a query."""
    return (call["query_start"].diff() > 0) & (call["seq_lens"] >= call["key_cache"].shape[2])


def grows(call: Call) -> bool:
    """Whether a tree has branches, and tokens before it."""
    counts = call["query_start"].diff()
    return bool(((counts > 3) & (call["seq_lens"] > counts + 12)).any())


def shares(call: Call) -> bool:
    """Whether two sequences with queries share keys."""
    starts = call["shared_start"].tolist()
    members = (call["query_start"].diff()[first:last] > 0 for first, last in itertools.pairwise(starts))
    return any(length and busy.sum() > 1 for length, busy in zip(call["shared_lens"], members, strict=True))


# Op, formats, features, and what else is asked of the call.
RARE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable[[Call], bool]]] = {
    "bias by pair": ("paged_attention", ("float32", "int8"), ("bias",), lambda c: in_pairs(c) and len(c["bias"]) > 1),
    "bias by pair, heads alike": ("paged_attention_stats", ("float16",), ("bias",), in_pairs),
    "tree and chunk": ("paged_attention", ("float32", "int4"), ("tree_mask", "chunk"), grows),
    "tree and window": ("paged_attention", ("bfloat16",), ("tree_mask", "window"), grows),
    "tree and slopes": ("paged_attention_stats", ("float32",), ("tree_mask", "slopes"), grows),
    "tree and bias": ("paged_attention", ("float32",), ("tree_mask", "bias"), grows),
    "mass": ("paged_attention_stats", ("float32", "int8"), ("softcap", "sinks"), lambda c: c["mass"]),
    "mass of a tree": ("paged_attention_stats", ("bfloat16",), ("tree_mask",), lambda c: c["mass"] and grows(c)),
    "settled blocks of two groups": ("paged_attention", ("k4",), (), lambda c: settled(c, 32)),
    "settled blocks of four groups": ("paged_attention_stats", ("k4",), (), lambda c: settled(c, 64)),
    "a shared prefix": ("cascade_attention", ("float32", "int8", "int4", "k4"), ("softcap",), shares),
    "a shared prefix, slopes and sinks": ("cascade_attention", ("bfloat16",), ("slopes", "sinks"), shares),
    "a shared prefix under a window": ("cascade_attention", ("float32",), ("window",), shares),
    "a latent under a window": ("latent_attention", ("int8",), ("window",), always),
    "queries with strides": ("paged_attention", ("float32", "int4"), ("strides",), lambda c: len(c["query"]) > 3),
}


@functools.cache
def find_case(what: str, name: str) -> Case:
    """The first random call that is as asked for."""
    op, _, features, asked = RARE[what]
    return next(
        case for seed in itertools.count() if asked((case := attention_case(seed, op, name, name, features)).arguments)
    )
