"""What random calls seldom meet, on every level of the native kernels: each once, against the naive truth."""

from __future__ import annotations

import pytest
import torch

from kvpass.kernels.cpu import backend, loader
from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.formats.settling import wide_view
from kvpass.kernels.reference import backend as reference
from tests.kernels.format_bounds import ROUNDINGS
from tests.kernels.rare_cases import RARE, find_case
from tests.kernels.settled_cases import ROWS

pytestmark = pytest.mark.skipif(not loader.supported_levels(), reason="the native kernels were not built")


@pytest.mark.sampled(2)
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


@pytest.mark.parametrize(("name", "dim"), [("k4", 64), ("k4", 80), ("v2", 64), ("v2", 96)])
def test_blocks_settle_to_the_bytes_of_the_reference(name: str, dim: int, level: str) -> None:
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(9, 2, 32, dim, generator=generator) * torch.rand(dim, generator=generator) * 4
    cache = FORMATS[name].allocate(9, 2, 32, dim, "cpu", 9).zero_()
    wide_view(cache, FORMATS[name])[-9:] = rows.bfloat16()
    found, want = cache.clone(), cache.clone()
    blocks = (-1 - torch.arange(9), torch.randperm(9, generator=generator))
    backend.settle_blocks([found], [name], *blocks)
    reference.settle_blocks([want], [name], *blocks)
    assert (found != want).float().mean() < 1e-3  # a sum of errors may be rounded otherwise, where two scales tie
