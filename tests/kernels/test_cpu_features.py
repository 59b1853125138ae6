"""What random calls seldom meet, on every level of the native kernels: each once, against the naive truth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpass.kernels.cpu import backend, loader
from kvpass.kernels.formats import FORMATS
from kvpass.kernels.settling import wide_view
from tests.kernels.format_bounds import ROUNDINGS
from tests.kernels.random_cases import BEYOND, Case, attention_case
from tests.kernels.settled_cases import ROWS

pytestmark = pytest.mark.skipif(not loader.supported_levels(), reason="the native kernels were not built")

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


@pytest.mark.parametrize("what", RARE)
def test_rare_calls_are_right_on_every_level(what: str, level: str) -> None:
    op, names, _, _ = RARE[what]
    for name in names:
        find_case(what, name).check(getattr(backend, op), ROUNDINGS["cpu"])


@pytest.mark.parametrize("threads", [1, 4])
def test_rows_that_see_nothing_of_any_part_are_zeros(threads: int, level: str) -> None:
    before, length, size = torch.get_num_threads(), 6000, 32
    caches = [torch.randn(-(-length // size), 2, size, 64) for _ in range(2)]
    step = (torch.arange(len(caches[0]))[None], torch.tensor([length]), torch.tensor([0, 1]))
    bias = torch.zeros(4, length)
    bias[1], bias[2, 100:] = -torch.inf, -torch.inf  # one head sees nothing, one only the newest hundred
    torch.set_num_threads(threads)
    try:
        out, lse, _ = backend.paged_attention_stats(torch.randn(1, 4, 64), *caches, *step, 0.1, bias=bias)
    finally:
        torch.set_num_threads(before)
    assert out[0, 1].eq(0).all() and lse[0, 1] == -torch.inf
    assert out[0, [0, 2, 3]].isfinite().all() and out[0, 2].any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_written_row_that_is_no_number_shows_and_no_other_does(wrong: float, level: str) -> None:
    new = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(3))
    new[5, 1, 7] = wrong
    tables, lens = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([16])
    for name in ROWS:
        caches = [FORMATS[name].allocate(1, 2, 16, 32, "cpu") for _ in range(2)]
        backend.write_cache(new, new, *caches, torch.arange(16), name, name)
        finite = backend.gather_cache(caches[1], tables, lens, 32, name)[0].isfinite()
        assert not finite[5, 1].all() and not finite[5, 1, 7], name
        finite[5, 1] = True
        assert finite.all(), name
    for name in ("k4", "v2"):
        cache = FORMATS[name].allocate(1, 2, 16, 32, "cpu", 1)
        wide_view(cache, FORMATS[name])[-1] = new.transpose(0, 1).bfloat16()
        backend.settle_blocks([cache], [name], torch.tensor([-1]), torch.tensor([0]))
        finite = backend.gather_cache(cache, tables, lens, 32, name)[0].isfinite()
        assert not finite[5, 1].any(), name
        finite[5, 1] = True
        assert finite.all(), name
