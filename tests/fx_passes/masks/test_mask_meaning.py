"""The meaning of a mask is read from its values: every kind in many spellings, every reason for refusal, no guess."""

import math
from collections.abc import Iterator
from math import inf

import pytest
import torch
from torch import Tensor

from kvpass.fx_passes.masks import mask_meaning, mask_probe
from tests.fx_passes.mask_forms import (
    HEADS,
    Evaluate,
    assert_rebuilds,
    biased,
    causal,
    grid,
    masked,
    meaning_of,
    name_of,
    per_head,
    refusal_of,
    window,
)

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


@pytest.fixture(autouse=True)
def near_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most claims need no probe beyond 256 and 2048 tokens, and the tests are quick without."""
    monkeypatch.setattr(mask_meaning, "ROUNDED_FROM", ())


@pytest.fixture
def far_probes(monkeypatch: pytest.MonkeyPatch, near_probes: None) -> None:
    """Probe as far as users do."""
    monkeypatch.setattr(mask_meaning, "ROUNDED_FROM", mask_probe.ROUNDED_FROM)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are small: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SPELLINGS = [(-inf, torch.float32), (-inf, torch.bfloat16), (-1e9, torch.float32), *((-1e4, dtype) for dtype in LOWEST)]


@pytest.mark.parametrize(("fill", "dtype"), [*SPELLINGS, *((lowest, dtype) for dtype, lowest in LOWEST.items())])
def test_a_mask_is_read_whatever_stands_for_hidden(fill: float, dtype: torch.dtype) -> None:
    plain, sliding = masked(causal, fill, dtype), masked(window(7), fill, dtype)
    meaning = meaning_of(plain)
    assert (meaning.describe(), meaning.evidence) == ("causal, up to 33 tokens", "probed at S = 1, 2, 5, 12, 33")
    assert meaning_of(sliding, 7).describe() == "sliding window 7, up to 33 tokens"
    for sinks in (False, True):
        assert_rebuilds(meaning_of(plain, sinks=sinks), plain, 1, 33, sinks=sinks)


def test_a_row_constant_means_nothing_to_softmax_but_counts_beside_a_sink() -> None:
    evaluate = biased(lambda q, k: (0.37 * q + 0 * k)[None])
    assert name_of(meaning_of(evaluate)) == "causal"
    assert meaning_of(evaluate, sinks=True, max_length=50).describe() == "causal + bias table, up to 50 tokens"
    per_head_only = biased(lambda q, k: per_head(1, 2, 3, 4) + 0 * q * k)
    assert name_of(meaning_of(per_head_only)) == "causal"
    assert meaning_of(per_head_only, sinks=True, max_length=9).bias[:, 7].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 2, 33, 100, 1024, 4096])
def test_a_window_is_found_to_the_token(size: int) -> None:
    for exact in [size] if size == 4096 else {max(1, size - 1), size, size + 1}:
        meaning = meaning_of(masked(window(exact)), size)
        assert (meaning.window, meaning.bias) == (exact, None) and meaning.limit > exact
    if size == 4096:
        assert meaning.evidence == "probed at S = 1, 2, 5, 12, 33, 4105"


def test_the_constant_of_a_comparison_may_be_negative_and_an_endless_slice_is_no_size() -> None:
    meaning = meaning_of(masked(lambda q, k: (k <= q) & (k - q > -3000)), -3000, 2**63 - 1, 0, 1, -1)
    assert (meaning.window, meaning.limit) == (3000, 3009)


def test_a_size_too_large_to_be_probed_limits_the_meaning() -> None:
    meaning = meaning_of(masked(window(131072)), 131072)
    assert meaning.describe() == "causal, up to 33 tokens"
    assert meaning_of(masked(window(131072)), 131072, max_length=500).describe() == "causal, up to 500 tokens"


def test_sizes_that_act_together_are_found() -> None:
    blocks = masked(lambda q, k: (k <= q) & (q // 64 - k // 64 < 40))
    assert meaning_of(blocks, 64, 40, max_length=2600).bias is not None
    assert meaning_of(blocks, 64, 40).describe() == "causal, up to 2048 tokens"
    # 64 x 256 cannot be probed: the mask looks causal, and holds no farther than it was probed.
    meaning = meaning_of(masked(lambda q, k: (k <= q) & (q // 64 - k // 64 < 256)), 64, 256)
    assert (meaning.window, meaning.bias, meaning.limit) == (None, None, 64 * 64 + 9)


def test_a_mask_that_flips_beyond_a_threshold_is_found() -> None:
    def wider_when_long(batch: int, length: int) -> Tensor:
        return masked(window(8) if length <= 3000 else window(16))(batch, length)

    reason = refusal_of(wider_when_long, 8, 16, 3000)
    assert "depends on the length" in reason and "hidden with 33 tokens, 0 with 3009" in reason
    sees_all_when_far = masked(lambda q, k: (k <= q) | (q > 2999))
    assert refusal_of(sees_all_when_far, 3000) == (
        "the mask lets the query at position 3000 see the key at position 3001, which comes later"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_that_the_dtype_cannot_count_are_found(dtype: torch.dtype, far_probes: None) -> None:
    assert "comes later" in refusal_of(masked(lambda q, k: k.to(dtype) <= q.to(dtype)))


@pytest.mark.parametrize("spelling", ["distance", "key", "newest first"])
@pytest.mark.parametrize("slopes", [(0.5, 0.25, 0.125, 0.0625), (0.7071067, 0.1, 0.0, 1 / 3), (0.3, 0.3, 0.3, 0.3)])
@pytest.mark.parametrize("size", [None, 20])
def test_alibi_is_found_however_it_is_spelled(
    spelling: str, slopes: tuple[float, ...], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_meaning, "ROUNDED_FROM", (256, 600))

    def evaluate(batch: int, length: int) -> Tensor:
        queries, keys = grid(length)
        distance = {"distance": keys - queries, "key": keys, "newest first": keys - (length - 1)}[spelling]
        seen = causal(queries, keys) if size is None else window(size)(queries, keys)
        return (per_head(*slopes) * distance).masked_fill(~seen, -3e38)[None]

    meaning = meaning_of(evaluate, *([] if size is None else [size]))
    assert (meaning.window, meaning.bias, meaning.limit) == (size, None, 609)
    assert torch.allclose(meaning.slopes, torch.tensor(slopes), rtol=1e-6, atol=0)
    assert_rebuilds(meaning, evaluate, 2, 300)


def test_alibi_beside_a_sink_must_be_relative_to_the_query() -> None:
    relative = biased(lambda q, k: per_head(0.5, 0.3, 0.2, 0.1) * (k - q))
    assert name_of(meaning_of(relative, sinks=True)) == "causal + ALiBi"
    by_key = biased(lambda q, k: per_head(0.5, 0.3, 0.2, 0.1) * k + 0 * q)
    meaning = meaning_of(by_key, sinks=True, max_length=64)
    assert meaning.describe() == "causal + bias table, up to 64 tokens"
    assert_rebuilds(meaning, by_key, 64, sinks=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slope", [0.5, 0.7])
def test_alibi_rounded_to_a_narrow_dtype_is_kept_as_it_is(dtype: torch.dtype, slope: float, far_probes: None) -> None:
    spelled_by_key = biased(lambda q, k: (per_head(slope).to(dtype) * k.to(dtype)) + 0 * q)
    meaning = meaning_of(spelled_by_key, max_length=2057)
    assert meaning.bias.shape == (1, 2057, 2057) and meaning.slopes is None and meaning.limit == 2057
    assert_rebuilds(meaning, spelled_by_key, 300 if dtype == torch.bfloat16 else 2057)
    spelled_by_distance = biased(lambda q, k: per_head(slope).to(dtype) * (k - q).to(dtype))
    meaning = meaning_of(spelled_by_distance, max_length=2057)
    assert meaning.bias.shape == (1, 2057) and meaning.slopes is None
    assert_rebuilds(meaning, spelled_by_distance, 300)
    if slope == 0.5:  # the rounding of a power of two begins where the dtype cannot count any more
        exact_up_to = {torch.bfloat16: 256, torch.float16: 2048}[dtype]
        meaning = meaning_of(spelled_by_key, max_length=exact_up_to)
        assert meaning.describe() == f"causal + ALiBi, up to {exact_up_to} tokens"


def test_buckets_of_distances_are_a_bias_by_distance() -> None:
    weights = torch.randn(32, HEADS, generator=torch.Generator().manual_seed(0))

    def buckets(queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries - keys).clamp(min=0)
        far = 16 + (torch.log(distance.float() / 16 + 1e-9) / math.log(128 / 16) * 16).long().clamp(0, 15)
        return weights[torch.where(distance < 16, distance, far)].permute(2, 0, 1)

    shared = meaning_of(biased(lambda q, k: buckets(q, k)[:1]), 16, 32, 128)
    assert (shared.describe(), shared.bias.shape) == ("causal + bias by distance, up to 2048 tokens", (1, 2048))
    meaning = meaning_of(biased(buckets), 16, 32, 128, max_length=500)
    assert meaning.bias.shape == (HEADS, 500) and meaning.limit == 500
    assert_rebuilds(meaning, biased(buckets), 7, 200, 500)


def test_windows_that_differ_between_heads_are_a_bias_by_distance() -> None:
    evaluate = biased(lambda q, k: torch.zeros(HEADS, len(q), len(q)), window(per_head(3, 3, 9, 50)))
    meaning = meaning_of(evaluate, 3, 9, 50, max_length=300)
    assert meaning.describe() == "sliding window 50 + bias by distance, up to 300 tokens"
    assert_rebuilds(meaning, evaluate, 5, 60)


TABLES = {
    "blocks and their neighbours": lambda q, k: (k <= q) & (q // 16 - k // 16 < 2),
    "global first keys": lambda q, k: (k <= q) & ((q - k < 16) | (k < 4)),
    "only itself on even rows": lambda q, k: (k <= q) & ((q % 2 == 1) | (k == q)),
    "itself hidden": lambda q, k: (k <= q) & ((k != q) | (q % 5 == 0)),
}


@pytest.mark.parametrize("name", TABLES)
def test_any_other_function_of_two_positions_is_a_table(name: str) -> None:
    evaluate = masked(TABLES[name])
    meaning = meaning_of(evaluate, 16, 4, 5, max_length=200)
    assert meaning.bias.shape == (1, 200, 200) and meaning.limit == 200
    # A table tells how far back it reaches, so that older blocks can be freed.
    assert meaning.window == {"blocks and their neighbours": 32}.get(name)
    assert_rebuilds(meaning, evaluate, 3, 100, 200)
    # Within one chunk the same mask is something simpler, and holds no farther.
    short = meaning_of(evaluate, 16, 4, 5, max_length=4)
    assert_rebuilds(short, evaluate, short.limit)


@pytest.mark.parametrize("size", [1, 2, 16, 20, 33, 100])
def test_chunks_are_found_to_the_token(size: int) -> None:
    evaluate = masked(lambda q, k: (k <= q) & (q // size == k // size))
    meaning = meaning_of(evaluate, size)
    assert (meaning.chunk, meaning.bias) == ((None, None) if size == 1 else (size, None))
    assert (meaning.window == 1) == (size == 1)  # a token that sees itself alone, by whatever name
    assert_rebuilds(meaning, evaluate, 3, 33, meaning.limit)
    # Chunks of which some head sees more, or shifted ones, are something else.
    other = meaning_of(masked(lambda q, k: (k <= q) & ((q + 1) // 16 == (k + 1) // 16)), 16, 1, max_length=64)
    assert other.chunk is None and other.bias.shape == (1, 64, 64)


def test_a_dilated_window_is_a_bias_by_distance() -> None:
    evaluate = masked(lambda q, k: (k <= q) & ((q - k) % 4 == 0) & ((q - k) // 4 < 64))
    meaning = meaning_of(evaluate, 4, 64)
    assert meaning.window == 63 * 4 + 1 and meaning.bias.shape == (1, 2048)
    assert_rebuilds(meaning, evaluate, 40, 400)


def test_a_large_table_is_refused_with_the_length_that_fits() -> None:
    by_key = biased(lambda q, k: per_head(1, 2, 3, 4) * torch.sin(k.float()) + 0 * q)
    reason = refusal_of(by_key, max_length=6000)
    assert "512 MiB" in reason and "CacheConfig(max_length=5792)" in reason
    by_distance = biased(lambda q, k: per_head(1, 2, 3, 4) * torch.sin((q - k).float()))
    assert "CacheConfig(max_length=12541)" in refusal_of(by_distance, max_length=100_000)


@pytest.mark.parametrize("fails", ["raises", "other shape"])
@pytest.mark.parametrize("rows", [7, 256, 1000])
def test_a_buffer_of_fixed_size_limits_the_length(fails: str, rows: int) -> None:
    buffer = torch.full((rows, rows), -inf).triu(1)
    calls = []

    def evaluate(batch: int, length: int) -> Tensor:
        calls.append((batch, length))
        mask = buffer[:length, :length]
        return mask if fails == "other shape" else mask + torch.zeros(batch, HEADS, length, length)

    meaning = meaning_of(evaluate, rows)
    assert (meaning.describe(), meaning.limit) == (f"causal, up to {rows} tokens", rows)
    assert meaning.evidence.endswith(f", {rows}; has no value at {rows + 1}")
    assert len(calls) < 50
    blocks = lambda b, s: evaluate(b, s) + masked(TABLES["blocks and their neighbours"])(b, s)  # noqa: E731
    assert meaning_of(blocks, rows, 16).limit == rows


def test_a_query_that_sees_nothing_beside_a_sink_is_a_row_of_the_table() -> None:
    evaluate = masked(lambda q, k: (k <= q) & (q != 3))
    meaning = meaning_of(evaluate, sinks=True, max_length=10)
    assert bool((meaning.bias[0, 3] == -inf).all())
    assert_rebuilds(meaning, evaluate, 10, sinks=True)
    itself_hidden = meaning_of(masked(lambda q, k: k < q), sinks=True)
    assert itself_hidden.bias[0, :3].tolist() == [-inf, 0, 0]


def test_a_past_key_that_is_lowered_keeps_its_bias() -> None:
    past = biased(lambda q, k: torch.where(k == 2, -1000.0, 0.0).expand(1, len(q), -1))
    assert meaning_of(past, max_length=20).bias[0, 9, 2] == -1000


def test_a_bias_spread_over_the_sequence_is_refused_but_not_one_of_fixed_length() -> None:
    spread = lambda b, s: torch.linspace(-1, 0, s) + torch.full((s, s), -inf).triu(1)  # noqa: E731
    assert "depends on the length" in refusal_of(spread)
    # Of fixed length it is a function of the distance, and even a linear one.
    fixed = meaning_of(biased(lambda q, k: torch.linspace(0, -1, 700)[(q - k).clamp(min=0)][None]), 700)
    assert (fixed.describe(), fixed.limit) == ("causal + ALiBi, up to 700 tokens", 700)


def test_the_reason_for_refusal_is_one_sentence() -> None:
    assert refusal_of(masked(lambda q, k: k <= q + (q == 3))) == (
        "the mask lets the query at position 3 see the key at position 4, which comes later"
    )


@pytest.mark.parametrize("size", [2, 5, 700])
def test_a_prefix_of_constant_length(size: int) -> None:
    for prefix in (lambda q, k: (k <= q) | (k < size), lambda q, k: (k <= q) | ((k < size) & (q < size))):
        meaning = meaning_of(masked(prefix), size)
        assert (meaning.prefix, meaning.window, meaning.bias) == (size, None, None)
        assert meaning.describe().startswith(f"causal behind a prefix of {size}, up to")


def test_what_a_prefix_does_not_go_with() -> None:
    causal = masked(lambda q, k: k <= q)
    faint = refusal_of(lambda b, s: causal(b, s).masked_fill(torch.arange(s) < 5, 0) + 0.1 * torch.ones(s, s).triu(1))
    assert faint == "the first 5 tokens see one another, but in one of 2 tokens not as each sees itself"
    half = refusal_of(lambda b, s: causal(b, s).masked_fill(torch.arange(s) < s // 2, 0))
    assert half == "the first 2 tokens see one another, but in one of 2 tokens not as each sees itself"
    fading = refusal_of(
        lambda b, s: causal(b, s).masked_fill(torch.arange(s) < 5, 0) - 0.1 * (torch.arange(s) - 5).clamp(min=0), 5
    )
    assert fading.endswith("only a causal one goes with a prefix")
    assert "prefix" not in refusal_of(masked(lambda q, k: ((k <= q) & (q - k < 9)) | ((k < 5) & (q < 5))), 5, 9)
    assert "prefix" not in refusal_of(masked(lambda q, k: (k <= q) | ((k < 5) & (q == 0))), 5)
    assert "prefix" not in refusal_of(masked(lambda q, k: k <= q + 1))
    assert "prefix" not in refusal_of(lambda batch, length: torch.zeros(length, length))


def random_bias(seed: int) -> Evaluate:
    """A random mask out of what models do, with a random spelling of hidden, that exists up to 48 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    visible = [causal, window(1 + draw(20)), *TABLES.values(), window(1 + torch.arange(HEADS)[:, None, None] * draw(9))]
    table = torch.randn(1 + 3 * draw(2), 48, 48, generator=generator)
    slopes = torch.rand(HEADS, 1, 1, generator=generator)
    kinds = [
        lambda q, k: 0.0 * slopes * (q - k),
        lambda q, k: slopes * (k - q),
        lambda q, k: slopes * k + torch.sin(q.double()),
        lambda q, k: table[:, 0][:, (q - k).abs()],
        lambda q, k: table[:, : len(q), : len(q)],
        lambda q, k: (slopes.bfloat16() * k.bfloat16()).float() + 0 * q,
    ]
    seen, kind, fill = visible[draw(len(visible))], kinds[draw(len(kinds))], [-inf, -1e4 - 60, -3e38][draw(3)]

    def evaluate(batch: int, length: int) -> Tensor:
        assert length <= 48
        queries, keys = grid(length)
        return kind(queries, keys).float().masked_fill(~seen(queries, keys), fill)[None]

    return evaluate


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_meaning_rebuilds_any_bias(sinks: bool) -> None:
    kinds = set()
    for seed in range(100):
        evaluate = random_bias(seed)
        meaning = meaning_of(evaluate, 60, sinks=sinks)
        assert meaning.limit == 48
        kinds.add(meaning.describe().replace(str(meaning.window), "w"))
        assert_rebuilds(meaning, evaluate, 1, 2, 17, 48, sinks=sinks)
    assert {"causal", "sliding window w", "causal + ALiBi", "sliding window w + ALiBi"} <= {
        kind.removesuffix(", up to 48 tokens") for kind in kinds
    }
    assert any("by distance" in kind for kind in kinds) and any("bias table" in kind for kind in kinds)


def test_heads_too_many_to_be_probed_far_limit_the_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_probe, "PROBE_ENTRIES", HEADS * 100 * 100)
    evaluate = biased(lambda q, k: per_head(1, 2, 3, 4) * (k - q))
    meaning = meaning_of(evaluate, 99, 256)
    assert meaning.describe() == "causal + ALiBi, up to 100 tokens"
    assert meaning.evidence == "probed at S = 1, 2, 5, 12, 33, 100"
    assert mask_meaning.recognise(mask_probe.MaskProbe(evaluate, HEADS, False).extend(50)).limit is None
