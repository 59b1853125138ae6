"""The torch implementation against the naive one, over every combination of features."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.reference import backend as reference
from kvpass.kernels.reference import naive

BOUNDS = {  # relative, absolute; of the half precisions the final rounding alone, so sums must have been float32
    torch.float64: (1e-11, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (2.0**-10, 2e-6),
    torch.bfloat16: (2.0**-8, 2e-6),
}
HEADS = ((4, 4), (6, 2), (8, 1), (3, 3))
DIMS = ((16, 16), (24, 8), (8, 24))
MIXES = {  # lengths and new tokens of each sequence
    "decode": ([37, 9, 1, 70, 33], [1, 1, 1, 1, 1]),
    "prefill": ([21, 34], [21, 34]),
    "mixed": ([40, 18, 1, 33, 5], [1, 18, 1, 9, 1]),
    "idle sequences": ([12, 7, 16], [0, 1, 0]),
}
FEATURES = list(
    itertools.product(
        (None, 4.0),  # softcap
        (None, 1, 6, 40),  # window
        (False, True),  # slopes
        (False, True),  # sinks
        ("none", "distance 1", "distance Hq", "pair 1", "pair Hq"),  # bias
    )
)


def assert_near(got: Tensor, want: Tensor) -> None:
    relative, absolute = BOUNDS[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute)


def random_bias(kind: str, heads: int, length: int, generator: torch.Generator) -> Tensor | None:
    """A bias of the kind, a fifth of it ``-inf``, so that some rows see nothing at all."""
    if kind == "none":
        return None
    shape = (heads if kind.endswith("Hq") else 1, *[length] * (2 if kind.startswith("pair") else 1))
    bias = torch.randn(shape, generator=generator)
    return bias.masked_fill_(torch.rand(shape, generator=generator) < 0.2, -torch.inf)


@pytest.mark.sampled(5)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("softcap", "window", "slopes", "sinks", "bias"), FEATURES)
def test_paged_attention_means_what_it_says(
    softcap: float | None,
    window: int | None,
    slopes: bool,
    sinks: bool,
    bias: str,
    random_step: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed = FEATURES.index((softcap, window, slopes, sinks, bias))
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = pick.choice(HEADS)
    lengths, counts = pick.choice(list(MIXES.values()))
    step = random_step(
        lengths,
        counts,
        heads=heads,
        dims=pick.choice(DIMS),
        block_size=pick.choice((1, 16, 32, 64)),
        dtype=pick.choice(list(BOUNDS)),
        seed=seed,
    )
    features = {
        "softcap": softcap,
        "window": window,
        "slopes": torch.rand(heads[0], generator=generator) if slopes else None,
        "sinks": torch.randn(heads[0], generator=generator) if sinks else None,
        "bias": random_bias(bias, heads[0], max(lengths) + pick.choice((0, 3)), generator),
    }
    want = step.attend(naive.paged_attention, 0.3, **features)
    if window is not None:
        step.forget_before(window)
    assert_near(step.attend(reference.paged_attention, 0.3, **features), want)
    # The same again, gathered in crumbs: chunks, parts of a row, and pieces of a prefill.
    monkeypatch.setitem(reference.GATHER_BYTES, "cpu", pick.choice((1, 3 << 10, 9 << 10)))
    monkeypatch.setitem(reference.SCORE_BYTES, "cpu", pick.choice((1, 2 << 10, 8 << 10)))
    assert_near(step.attend(reference.paged_attention, 0.3, **features), want)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_paged_attention_in_every_dtype_block_size_and_mix(
    dtype: torch.dtype, block_size: int, mix: str, random_step: Callable[..., Any]
) -> None:
    step = random_step(*MIXES[mix], block_size=block_size, dtype=dtype, seed=block_size)
    want = step.attend(naive.paged_attention, 0.25)
    assert_near(step.attend(reference.paged_attention, 0.25), want)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_cache_may_have_another_dtype_than_the_query(
    dtype: torch.dtype, cache_dtype: torch.dtype, random_step: Callable[..., Any]
) -> None:
    step = random_step(*MIXES["mixed"], dtype=dtype, cache_dtype=cache_dtype)
    assert_near(step.attend(reference.paged_attention, 0.25), step.attend(naive.paged_attention, 0.25))


def test_large_scores_keep_their_distances_in_low_precision(random_step: Callable[..., Any]) -> None:
    step = random_step([64], [1], dtype=torch.bfloat16)
    step.query *= 20
    assert_near(step.attend(reference.paged_attention, 1.0), step.attend(naive.paged_attention, 1.0))


@pytest.mark.parametrize("window", [0, -3])
def test_an_empty_window_shows_nothing(window: int, random_step: Callable[..., Any]) -> None:
    step = random_step(*MIXES["mixed"], dims=(8, 24))
    out = step.attend(reference.paged_attention, 1.0, window=window)
    assert out.shape == (30, 4, 24)
    assert not out.any()


def test_a_step_without_tokens_is_empty(random_step: Callable[..., Any]) -> None:
    step = random_step([5, 9], [0, 0], dims=(8, 24))
    assert step.attend(reference.paged_attention, 1.0).shape == (0, 4, 24)


def test_a_query_need_not_be_contiguous(random_step: Callable[..., Any]) -> None:
    step = random_step(*MIXES["mixed"])
    want = step.attend(reference.paged_attention, 1.0)
    step.query = step.query.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(step.attend(reference.paged_attention, 1.0), want, rtol=0, atol=0)


def test_a_bias_that_is_too_short_is_an_error(random_step: Callable[..., Any]) -> None:
    step = random_step(*MIXES["decode"])
    with pytest.raises(InputError, match=r"covers 69 tokens, but the step needs 70"):
        step.attend(reference.paged_attention, 1.0, bias=torch.zeros(1, 69))
    with pytest.raises(InputError, match=r"covers 69 tokens, but the step needs 70"):
        step.attend(reference.paged_attention, 1.0, bias=torch.zeros(1, 69, 69), window=5)
    step.attend(reference.paged_attention, 1.0, bias=torch.zeros(1, 5), window=5)


def test_a_query_of_another_step_is_an_error(random_step: Callable[..., Any]) -> None:
    step = random_step(*MIXES["decode"])
    step.query = step.query[:4]
    with pytest.raises(InputError, match=r"query has 4 rows, but query_start ends at 5"):
        step.attend(reference.paged_attention, 1.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_write_cache_writes_its_slots_and_no_other(cache_dtype: torch.dtype, heads: int, block_size: int) -> None:
    generator = torch.Generator().manual_seed(block_size)
    key, value = (torch.randn(heads, 9, dim, generator=generator).transpose(0, 1) for dim in (8, 4))
    slots = torch.randperm(20 * block_size, generator=generator)[:9]
    shapes = [(20, heads, block_size, dim) for dim in (8, 4)]
    caches = [torch.randn(shape, generator=generator).to(cache_dtype) for shape in shapes]
    wanted = [cache.clone() for cache in caches]
    for t, slot in enumerate(slots.tolist()):
        for new, cache in zip((key, value), wanted, strict=True):
            cache[slot // block_size, :, slot % block_size] = new[t].to(cache_dtype)
    reference.write_cache(key, value, caches[0], caches[1], slots)
    for got, want in zip(caches, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (7, 9), (2, 1, 1, 9), (6, 7, 1), (1, 6, 7, 9), (2, 6, 7, 9), ()])
def test_dense_attention_means_what_it_says(
    bias_shape: tuple[int, ...] | None,
    sinks: bool,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(len(bias_shape or ()))
    kv_heads = 2 if sinks else 6
    query, key, value = (
        torch.randn(2, *shape, generator=generator).to(dtype)
        for shape in ((6, 7, 8), (kv_heads, 9, 8), (kv_heads, 9, 5))
    )
    bias = None
    if bias_shape is not None:
        bias = torch.randn(bias_shape, generator=generator)
        bias = torch.where(torch.rand(bias_shape, generator=generator) < 0.3, -torch.inf, bias)
    arguments = (query, key, value, bias, 0.5, softcap, torch.randn(6, generator=generator) if sinks else None)
    want = naive.dense_attention(*arguments)
    assert_near(reference.dense_attention(*arguments), want)
    monkeypatch.setitem(reference.SCORE_BYTES, "cpu", 600)
    assert_near(reference.dense_attention(*arguments), want)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sinks", [None, torch.zeros(2)], ids=["plain", "sinks"])
def test_dense_rows_that_see_nothing_are_zero(sinks: Tensor | None) -> None:
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)
    bias = torch.zeros(3, 5)
    bias[1] = -torch.inf
    out = reference.dense_attention(query, key, key, bias, 1.0, None, sinks)
    assert not out[:, :, 1].any()
    assert out[:, :, [0, 2]].all()
    assert not reference.dense_attention(query, key[:, :, :0], key[:, :, :0], None, 1.0, None, sinks).any()
