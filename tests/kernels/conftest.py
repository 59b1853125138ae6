"""Random steps over poisoned caches, memory that is NaN until written, and each level of the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpass.kernels.cpu import loader

BEYOND = 10**9  # a block id that nobody may follow


@dataclass
class RandomStep:
    """A step of ``paged_attention``: ``lengths`` of the sequences, of which the newest ``counts`` tokens are queries.

    Every slot that belongs to no sequence holds NaN or infinity. The first two sequences that are long enough share
    blocks, the last of which the shorter one fills only in part.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor

    def attend(self, op: Callable[..., Any], scale: float, *features: object, **named: object) -> Any:
        """The output of ``op``, a ``paged_attention``, for this step."""
        caches = (self.key_cache, self.value_cache)
        return op(self.query, *caches, self.block_tables, self.seq_lens, self.query_start, scale, *features, **named)

    def forget_before(self, window: int) -> None:
        """Let the block tables forget every block that lies wholly outside the window of all queries."""
        size = self.key_cache.shape[2]
        counts = self.query_start.diff()
        for n, (length, count) in enumerate(zip(self.seq_lens.tolist(), counts.tolist(), strict=True)):
            self.block_tables[n, : max(0, length - count - window + 1) // size] = BEYOND


def make_step(
    lengths: list[int],
    counts: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> RandomStep:
    """A random step; the same arguments give the same step."""
    random = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length in lengths]
    width = max(needed) + 1
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=random).tolist()
    tables = torch.full((len(lengths), width), BEYOND)
    key_cache = torch.full((blocks, heads[1], block_size, dims[0]), torch.nan, dtype=torch.float64)
    value_cache = torch.full((blocks, heads[1], block_size, dims[1]), torch.nan, dtype=torch.float64)
    value_cache[order[-1]] = torch.inf
    for n, length in enumerate(lengths):
        own = [order.pop() for _ in range(needed[n])] if n else [order.pop(0) for _ in range(needed[n])]
        shared = min(needed[n], needed[n - 1]) if n == 1 else 0
        tables[n, : needed[n]] = torch.tensor(own)
        tables[n, :shared] = tables[0, :shared]
        k = torch.arange(length)
        for cache, dim in ((key_cache, dims[0]), (value_cache, dims[1])):
            cache[tables[n, k // block_size], :, k % block_size] = torch.randn(
                length, heads[1], dim, generator=random, dtype=torch.float64
            )
    starts = torch.tensor([0, *counts]).cumsum(0)
    query = torch.randn(int(starts[-1]), heads[0], dims[0], generator=random, dtype=torch.float64)
    return RandomStep(
        query.to(dtype),
        key_cache.to(cache_dtype or dtype),
        value_cache.to(cache_dtype or dtype),
        tables,
        torch.tensor(lengths),
        starts,
    )


@pytest.fixture
def random_step() -> Callable[..., RandomStep]:
    """:func:`make_step`."""
    return make_step


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN, so that an output that is not written in full shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=loader.supported_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force each level in turn."""
    monkeypatch.setenv("KVPASS_CPU_ISA", request.param)
    loader.current.cache_clear()
    yield request.param
    loader.current.cache_clear()
