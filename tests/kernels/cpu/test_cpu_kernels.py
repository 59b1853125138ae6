"""The native kernels, on every level that this machine has, against the naive truth; skipped where none was built."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpass.errors import ConfigError, InputError
from kvpass.kernels.cpu import backend, loader
from kvpass.kernels.formats.cache_formats import FORMATS, pack_slabs, unpack_slabs
from kvpass.kernels.reference import backend as reference
from kvpass.kernels.reference import naive
from tests.kernels.cache_cases import CHECKS
from tests.kernels.format_bounds import ROUNDINGS
from tests.kernels.random_cases import ATTENTIONS, attention_case
from tests.kernels.settled_cases import NAMES, ROWS, settled_caches

LEVELS = loader.supported_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built")


@pytest.fixture
def many_threads() -> Iterator[None]:
    """Work for four threads, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", ATTENTIONS)
def test_attention_is_right_on_every_level(op: str, name: str, level: str) -> None:
    pick = random.Random(f"{level} {op} {name}")
    other = pick.choice(NAMES)
    formats = pick.choice(((name, other), (other, name), (name, name)))
    attention_case(pick.randrange(10**6), op, *formats).check(getattr(backend, op), ROUNDINGS["cpu"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", CHECKS)
def test_caches_are_filled_and_read_right_on_every_level(op: str, name: str, level: str) -> None:
    pick = random.Random(f"{level} {op} {name}")
    CHECKS[op](getattr(backend, op), pick.randrange(10**6), name, pick.choice(NAMES))


def long_step(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two sequences long enough to be cut among threads: one decodes, one has many new tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths, counts, size, dims = [1500, 700], [1, 40], 32, (64, 96)
    needed = [-(-length // size) for length in lengths]
    tables = torch.zeros(2, max(needed), dtype=torch.int64)
    order = torch.randperm(sum(needed), generator=generator)
    tables[0, : needed[0]], tables[1, : needed[1]] = order[: needed[0]], order[needed[0] :]
    caches = [
        pack_slabs(torch.randn(sum(needed), 2, size, dim, generator=generator), FORMATS[name]).contiguous()
        for dim in dims
    ]
    query = torch.randn(sum(counts), 6, dims[0], generator=generator).to(dtype)
    step = {"block_tables": tables, "seq_lens": torch.tensor(lengths), "query_start": torch.tensor([0, 1, 41])}
    formats = {"key_format": name, "value_format": name}
    return {"query": query, "key_cache": caches[0], "value_cache": caches[1], **step, "scale": 0.125, **formats}


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize("op_threads", [True, False], ids=["torch's threads", "own threads"])
def test_parts_of_a_long_sequence_are_merged(
    name: str, op_threads: bool, many_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = long_step(name)
    sinks = torch.randn(6)
    library = loader.current()
    library.kvpass_share_threads(loader.find_parallel_region() if op_threads else None)
    try:
        out, lse, mass = backend.paged_attention_stats(**arguments, sinks=sinks, mass=True)
        again = backend.paged_attention(**arguments, sinks=sinks)
    finally:
        library.kvpass_share_threads(loader.find_parallel_region())
    assert torch.equal(out, again), "the result depends on which thread was quicker"
    torch.set_num_threads(1)
    alone = backend.paged_attention_stats(**arguments, sinks=sinks, mass=True)
    exact = reference.paged_attention_stats(**arguments, sinks=sinks, mass=True)
    for found, single, want in zip((out, lse, mass), alone, exact, strict=True):
        torch.testing.assert_close(found, single, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_the_kernels_share_torchs_openmp() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists() or loader.find_parallel_region() is None:
        pytest.skip("this system does not tell, or torch has another OpenMP")
    loader.current()
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, "a second OpenMP runtime was loaded"


def test_a_key_that_is_no_number_stays_visible(level: str) -> None:
    for name in ROWS:
        arguments = long_step(name)
        keys = torch.randn(1, 2, 32, 64)
        keys[0, 1, 3, 5] = torch.nan
        block = arguments["block_tables"][0, 2]
        arguments["key_cache"][block] = pack_slabs(keys, FORMATS[name])[0]
        out = backend.paged_attention(**arguments)
        assert out[0, 3:].isnan().all(), name
        assert out[0, :3].isfinite().all(), name
        assert out[1:].isfinite().all(), name


@pytest.mark.parametrize("dims", [(16, 16), (20, 12), (576, 512), (7, 5)])
def test_any_head_dim_is_served(dims: tuple[int, int], level: str) -> None:
    generator = torch.Generator().manual_seed(dims[0])
    caches = [torch.randn(4, 1, 16, dim, generator=generator).bfloat16() for dim in dims]
    query = torch.randn(3, 2, dims[0], generator=generator)
    step = (torch.tensor([[2, 0, 3]]), torch.tensor([41]), torch.tensor([0, 3]))
    got = backend.paged_attention(query, *caches, *step, 0.2)
    want = naive.paged_attention(query, *(unpack_slabs(cache, FORMATS["bfloat16"]) for cache in caches), *step, 0.2)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_small_weights_beside_a_large_one_are_not_rounded_off(dim: int, heads: int, level: str) -> None:
    length, size = 300, 32
    keys, values = torch.zeros(10, 1, size, dim), torch.ones(10, 1, size, dim)
    values[..., ::2] = 0.25
    keys[0, 0, 0, 0], values[0, 0, 0] = 7.0, -values[0, 0, 0]  # one key gets 1 of the weight, each other 1 / 400
    caches = [pack_slabs(part, FORMATS["int4"]) for part in (keys, values)]
    query = torch.zeros(1, heads, dim)
    query[..., 0] = 1.0
    step = (torch.arange(10)[None], torch.tensor([length]), torch.tensor([0, 1]))
    scale = float(torch.tensor(400.0).log()) / 7
    out = backend.paged_attention(query, *caches, *step, scale, key_format="int4", value_format="int4")
    numbers = (unpack_slabs(cache, FORMATS["int4"]) for cache in caches)
    want = naive.paged_attention(query, *numbers, *step, scale)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)  # else 0.3


@pytest.mark.parametrize("rise", [5.0, 30.0, -30.0], ids=["slowly", "by leaps", "falling"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_the_softmax_follows_scores_that_rise(name: str, rise: float, level: str) -> None:
    chunks, size, dim = 5, 32, 64
    generator = torch.Generator().manual_seed(3)
    scores = rise * torch.arange(chunks).repeat_interleave(128) + torch.randn(chunks * 128, generator=generator)
    keys = (scores[:, None] / dim).expand(-1, dim).reshape(-1, 1, size, dim)
    values = torch.randn(len(keys), 1, size, dim, generator=generator)
    caches = [pack_slabs(part, FORMATS[name]).contiguous() for part in (keys, values)]
    step = (torch.arange(len(keys))[None], torch.tensor([len(scores)]), torch.tensor([0, 1]), 1.0)
    found = backend.paged_attention_stats(torch.ones(1, 4, dim), *caches, *step, key_format=name, value_format=name)
    numbers = [unpack_slabs(cache, FORMATS[name]) for cache in caches]
    want = naive.paged_attention(torch.ones(1, 4, dim), *numbers, *step)
    torch.testing.assert_close(found[0].double(), want, rtol=0, atol=4e-3)
    exact = (numbers[0].double().sum(-1).flatten()).logsumexp(0)
    torch.testing.assert_close(found[1].double(), exact.expand(1, 4), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64), (64, 192)])
@pytest.mark.parametrize(("new", "window"), [(1, 133), (1, 150), (1, 0), (2, 77), (9, 0)])
def test_k4v2_is_read_from_any_key_on(
    new: int, window: int, dims: tuple[int, int], dtype: torch.dtype, level: str
) -> None:
    length, size = 300, 32
    generator = torch.Generator().manual_seed(new + window)
    written = (torch.arange(12 * size) < length).view(12, size)
    rows = [torch.randn(12, 2, size, dim, generator=generator) for dim in dims]
    rows[0] *= torch.rand(12, 2, 1, dims[0], generator=generator) * 3  # units of channels differ
    caches, numbers, ids = settled_caches((rows[0], rows[1]), written, generator)
    query = torch.randn(new, 8, dims[0], generator=generator).to(dtype)
    step = {"seq_lens": torch.tensor([length]), "query_start": torch.tensor([0, new]), "scale": dims[0] ** -0.5}
    step |= {"window": window} if window else {}
    formats = {"key_format": "k4", "value_format": "v2"}
    found = backend.paged_attention(query, *caches, ids[None, :10].contiguous(), **step, **formats)
    want = naive.paged_attention(query, *numbers, torch.arange(10)[None], **step)
    close = 2e-3 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), want, rtol=close, atol=close)


BAD_CALLS = [
    (
        {"block_tables": lambda t: t.fill_(9999)},
        r"kvpass::paged_attention: block_tables holds 9999, permitted are 0 to",
    ),
    ({"block_tables": lambda t: t.fill_(-1)}, r"block_tables holds -1"),
    ({"seq_lens": lambda t: t.fill_(99999)}, r"sequence 0 has 1 new tokens, a length of 99999"),
    ({"query_start": lambda t: t.add_(1)}, r"does not hold the first row"),
    ({"query": lambda t: t[:30]}, r"query has 30 rows, but query_start ends at 41"),
    ({"query": lambda t: t[:, :5]}, r"query has 5 heads of dim 64, the cache 2 of dim 64"),
    ({"query": lambda t: t[..., :32]}, r"query has 6 heads of dim 32"),
    ({"seq_lens": lambda t: t.int()}, r"seq_lens is torch.int32: it must be torch.int64"),
    ({"bias": lambda _: torch.zeros(1, 1499)}, r"the bias covers 1499 tokens, but the step needs 1500"),
    ({"bias": lambda _: torch.zeros(3, 1500)}, r"bias is \(3, 1500\): permitted are"),
    ({"slopes": lambda _: torch.zeros(3)}, r"one number per query head"),
    ({"chunk": lambda _: 0}, r"chunk=0 must be at least 1"),
    ({"tree_mask": lambda _: torch.ones(41, 20, dtype=torch.bool)}, r"tree_mask has 20 columns"),
    ({"key_format": lambda _: None}, r"a uint8 cache needs the name of its format"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_a_bad_call_is_refused_and_says_why(change: dict[str, Any], message: str) -> None:
    arguments = long_step("int8")
    arguments |= {name: spoil(arguments.get(name)) for name, spoil in change.items()}
    with pytest.raises(InputError, match=message):
        backend.paged_attention(**arguments)


def test_bad_slots_and_blocks_are_refused() -> None:
    caches = [torch.zeros(4, 2, 16, 8) for _ in range(2)]
    new = torch.ones(3, 2, 8)
    with pytest.raises(InputError, match=r"slot_mapping holds 64, permitted are 0 to 63"):
        backend.write_cache(new, new, *caches, torch.tensor([1, 64, 2]))
    with pytest.raises(InputError, match=r"cannot write \(3, 2, 8\) to 2 slots"):
        backend.write_cache(new, new, *caches, torch.tensor([1, 2]))
    with pytest.raises(InputError, match=r"norm_rotary_write: slot_mapping holds -1, permitted are 0 to 63"):
        backend.norm_rotary_write(new, new, new, *caches, torch.tensor([1, -1, 2]), None, None, 1e-6, None, None)
    with pytest.raises(InputError, match=r"cos and sin both \[3, Dr\]"):
        angles = torch.zeros(2, 8)
        backend.norm_rotary_write(new, new, new, *caches, torch.arange(3), None, None, 1e-6, angles, angles)
    with pytest.raises(InputError, match=r"target holds 4, permitted are 0 to 3"):
        backend.copy_blocks(caches, torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(InputError, match=r"gather_cache: block_tables holds 4, permitted are 0 to 3"):
        backend.gather_cache(caches[0], torch.tensor([[3, 9], [4, 0]]), torch.tensor([16, 1]), 8)
    with pytest.raises(InputError, match=r"gather_cache: block_tables holds -1, permitted are 0 to 3"):
        backend.gather_cache(caches[0], torch.tensor([[-1]]), torch.tensor([1]), 8)
    assert not any(cache.any() for cache in caches)


def test_what_the_kernels_cannot_serve_has_a_reason() -> None:
    arguments = long_step("float32")
    assert backend.unsupported("paged_attention", **arguments) is None
    arguments["query"] = arguments["query"].double()
    why = backend.unsupported("paged_attention", **arguments)
    assert why == "query is torch.float64: permitted are torch.float32, torch.bfloat16 and torch.float16"
    cache = torch.zeros(2, 3, 4).transpose(0, 1)
    assert backend.unsupported("copy_blocks", caches=[cache]) == "a cache is not contiguous"


def test_a_level_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_CPU_ISA", "avx1024")
    loader.current.cache_clear()
    with pytest.raises(ConfigError, match=r"KVPASS_CPU_ISA=avx1024 is not to be had here: choose one of base"):
        loader.current()
    loader.current.cache_clear()


@pytest.mark.parametrize("changed", [{"CALL_FIELDS": (43, 36, 9, 14)}, {"ENTRY_POINTS": ("kvpass_attention", "x")}])
def test_an_object_of_other_sources_is_not_used(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in changed.items():
        monkeypatch.setattr(loader, name, value)
    loader.open_level.cache_clear()
    with pytest.raises(OSError, match=r"was built from other sources: run `pip install -e \.` again"):
        loader.open_level("base")


def test_without_an_object_nothing_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVPASS_CPU_ISA", raising=False)
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    for cached in (loader.current, loader.supported_levels):
        cached.cache_clear()
    try:
        assert not backend.available()
        assert "pip install -e ." in backend.why_unavailable()
    finally:
        monkeypatch.undo()
        for cached in (loader.current, loader.supported_levels):
            cached.cache_clear()
