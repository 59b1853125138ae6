"""Masks proven for all lengths: what the proof says is what the mask is, far beyond anything that was evaluated.

The oracle is the mask itself, a function of query and key that torch computes at sampled places up to millions of
tokens away; the proof has seen the graph, and values up to a few hundred tokens.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpass.fx_passes.graph import HORIZON
from kvpass.fx_passes.masks import mask_meaning
from kvpass.fx_passes.masks.mask_meaning import read_mask_meaning
from kvpass.fx_passes.symbolic.index_terms import UnreadableError
from kvpass.types import MaskMeaning
from tests.fx_passes.mask_tracing import TracedMask

Visible = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def near_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is evaluated beyond 600 tokens: what is right there is right by proof. And the tests are quick."""
    monkeypatch.setattr(mask_meaning, "ROUNDED_FROM", ())
    monkeypatch.setattr(mask_meaning, "LONGEST", 600)


def mask_of(visible: Visible) -> TracedMask:
    def mask(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        return visible(positions[:, None], positions[None])

    return TracedMask(mask)


def shown(meaning: MaskMeaning, queries: Tensor, keys: Tensor) -> Tensor:
    """What the contract of MaskMeaning shows at places of (query, key), all below its limit."""
    distance = queries - keys
    seen = distance >= 0
    if meaning.window is not None:
        seen = seen & (distance < meaning.window)
    if meaning.chunk is not None:
        seen = seen & (queries // meaning.chunk == keys // meaning.chunk)
    if meaning.bias is not None:
        table = meaning.bias[0]
        inside = (distance >= 0) & (distance < len(table)) & (queries < len(table) if table.dim() == 2 else True)
        place = (queries.clamp(max=len(table) - 1), keys.clamp(max=len(table) - 1)) if table.dim() == 2 else (distance,)
        found = table[tuple(p.clamp(0, len(table) - 1) for p in place)] > -math.inf
        seen = seen & torch.where(inside, found, True)
    return seen


def places(limit: int | None, *numbers: int) -> tuple[Tensor, Tensor]:
    """Queries and keys all over the sequence, many of them near each of ``numbers``, below ``limit``."""
    generator = torch.Generator().manual_seed(0)
    end = HORIZON if limit is None else limit
    near = {n * factor + d for n in (0, *numbers) for factor in (1, 2, 3, 7) for d in range(-2, 3)}
    fixed = torch.tensor(sorted(n for n in near if 0 <= n < end))
    queries = torch.cat([fixed, torch.randint(end, (200,), generator=generator)])
    offsets = torch.cat([torch.arange(-3, 4), fixed, torch.randint(min(end, 20_000), (50,), generator=generator)])
    queries = queries[:, None].expand(-1, len(offsets))
    return queries, (queries - offsets).clamp(0, end - 1)


def assert_right(meaning: MaskMeaning, visible: Visible, *numbers: int) -> None:
    queries, keys = places(meaning.limit, *numbers)
    assert torch.equal(shown(meaning, queries, keys), visible(queries, keys).expand(queries.shape))


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


PROVEN: dict[str, tuple[Visible, str]] = {
    "comparison": (causal, "causal"),
    "distance below 0": (lambda q, k: ~(q - k < 0), "causal"),
    "window": (lambda q, k: (k <= q) & (q - k < 100), "sliding window 100"),
    "window from below": (lambda q, k: (k <= q) & (k > q - 100), "sliding window 100"),
    "window of 131072": (lambda q, k: (k <= q) & (k > q - 131072), "sliding window 131072"),
    "window by product": (lambda q, k: (k <= q) & (q - k < 3 * 5 * 1000 + 1), "sliding window 15001"),
    "window by clamp": (lambda q, k: (q - k).clamp(0, 500) * (k <= q) + (k > q) * 500 < 500, "sliding window 500"),
    "chunks": (lambda q, k: (k <= q) & (q // 8192 == k // 8192), "chunks of 8192"),
    "chunks by start": (lambda q, k: (k <= q) & (k >= q - q % 7), "chunks of 7"),
    "chunks by float division": (
        lambda q, k: (k <= q) & ((q / 24).floor() == torch.div(k, 24, rounding_mode="trunc")),
        "chunks of 24",
    ),
    "chunks by remainders": (lambda q, k: (k <= q) & (q - q % 100 == k - k.remainder(100)), "chunks of 100"),
    "window in chunks": (
        lambda q, k: (k <= q) & (q // 8192 == k // 8192) & (q - k < 5000),
        "sliding window 5000 + chunks of 8192",
    ),
    "what no position reaches": (lambda q, k: (k <= q) | (q < 0) | (k * 2 > q + k + 10**8), "causal"),
    "by squares": (lambda q, k: (q - k).relu() * 3 <= (q - k) * 3, "causal"),
    "with exp": (lambda q, k: (k <= q) & ((q - k).float().exp() > -1), "causal"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PROVEN)
def test_a_meaning_is_proven_for_every_length(name: str) -> None:
    visible, description = PROVEN[name]
    meaning = mask_of(visible).meaning()
    assert isinstance(meaning, MaskMeaning), meaning
    assert (meaning.describe(), meaning.limit) == (description, None)
    assert meaning.evidence.startswith("proven for every length; checked at S = 1, 2, 5, 12, 33")
    assert_right(meaning, visible, 7, 24, 100, 500, 5000, 8192, 15000, 131072)


def buffer(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def packed(batch: int, length: int) -> Tensor:
    """How transformers finds packed sequences: where positions do not go up by one, a new one begins."""
    positions = torch.arange(length).unsqueeze(0).expand(batch, -1)
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    sequence = (steps != 1).cumsum(-1)
    rows, queries, keys = torch.arange(batch)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    same = sequence[rows, queries] == sequence[rows, keys]
    return (same & (keys <= queries))[:, None]


def padding(batch: int, length: int) -> Tensor:
    """A padding mask that is all ones, positions counted from it, and both in the mask."""
    attention_mask = torch.ones(batch, length).long()
    positions = attention_mask.cumsum(-1) - 1
    kept = attention_mask[:, None, None, :].bool()
    return (positions[:, None, None, :] <= positions[:, None, :, None]) & kept


SPELLED: dict[str, tuple[Callable[[int, int], Tensor], str]] = {
    "tril": (lambda b, s: torch.ones(s, s).tril() != 0, "causal"),
    "triu of -inf": (lambda b, s: torch.full((s, s), -math.inf).triu(1), "causal"),
    "finfo.min twice": (lambda b, s: 2 * torch.full((s, s), torch.finfo(torch.float32).min).triu(1), "causal"),
    "1 - tril times -1e4": (lambda b, s: (1.0 - torch.ones(s, s).tril()) * -10000.0, "causal"),
    "uint8": (lambda b, s: torch.triu(torch.ones(1, s, s), 1).to(torch.uint8) == 0, "causal"),
    "bfloat16": (lambda b, s: torch.full((s, s), -math.inf, dtype=torch.bfloat16).triu(1), "causal"),
    "band": (lambda b, s: torch.ones(s, s).bool().tril() & torch.ones(s, s).bool().triu(-4999), "sliding window 5000"),
    "cumsum of ones": (
        lambda b, s: torch.ones(s).cumsum(0)[:, None] >= torch.ones(s).cumsum(0),
        "causal",
    ),
    "padding": (padding, "causal"),
    "packed sequences": (packed, "causal"),
    "buffer": (lambda b, s: BUFFER[:s, :s], "causal, up to 60 tokens"),
    "buffer of four dims": (lambda b, s: BUFFER[None, None, :s, :s].expand(b, 1, s, s), "causal, up to 60 tokens"),
    "shifted positions": (lambda b, s: (torch.arange(s) + 5)[:, None] >= torch.arange(5, s + 5), "causal"),
    "flipped twice": (lambda b, s: torch.arange(s).flip(0).flip(0)[:, None] >= torch.arange(s), "causal"),
    "from the end": (lambda b, s: torch.arange(s).flip(0)[:, None] <= torch.arange(s).flip(0), "causal"),
    "reshaped": (lambda b, s: torch.ones(s, s).tril().reshape(1, s, 1, s).permute(0, 2, 1, 3) > 0, "causal"),
    "gathered": (lambda b, s: torch.ones(s, s).tril().index_select(0, torch.arange(s)) > 0, "causal"),
    "joined": (
        lambda b, s: torch.cat([torch.zeros(1).long(), torch.arange(s)])[1:][:, None] >= torch.arange(s),
        "causal",
    ),
}
BUFFER = buffer(60)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SPELLED)
def test_a_spelling_is_read(name: str) -> None:
    mask, description = SPELLED[name]
    meaning = TracedMask(mask).meaning()
    assert isinstance(meaning, MaskMeaning), meaning
    assert meaning.describe() == description
    assert meaning.evidence.startswith("proven")
    assert ("packed" in name) == ("packed-sequence detection" in meaning.evidence)


# Each equals a simple mask wherever it is probed without a proof, and is something else beyond.
ADVERSARIAL: dict[str, tuple[Visible, tuple[int, ...]]] = {
    "sees ahead from 17^3 on": (lambda q, k: (k <= q) | ((q >= 17**3) & (k == q + 1)), (4913,)),
    "sees ahead at one place": (lambda q, k: (k <= q) | ((q * q == 1234**2) & (k == 1300)), (1234, 1300)),
    "sees ahead where exp says so": (lambda q, k: (k <= q) | ((q.float().log() > 8.5) & (k == q + 1)), (4914, 4915)),
    "forgets the first token": (lambda q, k: (k <= q) & ~((q * q > 10**8) & (k == 0)), (10000,)),
    "forgets far away": (lambda q, k: (k <= q) & ~((q // 77 // 77 // 77 > 0) & (k == 3)), (456533,)),
    "window that ends": (lambda q, k: (k <= q) & ((q - k < 30) | (q > 131 * 131 * 3)), (51483,)),
    "window that moves": (lambda q, k: (k <= q) & (q - k < 30 + q // 99999), (99999,)),
    "chunks that change": (lambda q, k: (k <= q) & (q // (20 + q // 70001) == k // 20), (70001,)),
    "distance of rounded products": (lambda q, k: (k <= q) & (q * 0.1 - k * 0.1 < 1.05), (600,)),
    "counted in bfloat16": (lambda q, k: k.bfloat16() <= q.bfloat16(), (256,)),
    "counted beyond float32": (
        lambda q, k: (k <= q) | (((q * 4096).float() + 1 == (q * 4096).float()) & (k == q + 1)),
        (4096, 4097),
    ),
    "compared beyond float32": (lambda q, k: (k <= q) | ((k - q) * 4096.0 + q * 4096 == q * 4096), (4096, 4097)),
    "one query, one key": (lambda q, k: (k <= q) & ~((q - 100003) ** 2 + (k - 7) ** 2 == 0), (100003,)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_mask_that_changes_beyond_the_probes_is_not_taken_for_a_simple_one(name: str) -> None:
    visible, numbers = ADVERSARIAL[name]
    traced = mask_of(visible)
    try:
        meaning = traced.meaning()
    except UnreadableError:
        meaning = traced.meaning(read=False)
    if isinstance(meaning, str):
        assert "comes later" in meaning
        near = torch.tensor([n + d for n in numbers for d in (-1, 0, 1, 2)])
        assert bool((visible(near[:, None], near) & (near > near[:, None])).any())
    else:
        assert meaning.limit is not None and meaning.limit <= max(numbers) + 1
        assert_right(meaning, visible, *numbers)


def test_how_far_a_simple_meaning_holds_is_proven_to_the_token() -> None:
    meaning = mask_of(ADVERSARIAL["forgets the first token"][0]).meaning()
    assert meaning.describe() == "causal, up to 10001 tokens"
    assert meaning.evidence.endswith("proven up to 10001, and something else beyond")


def test_what_cannot_be_read_ends_at_the_longest_probe() -> None:
    visible = ADVERSARIAL["sees ahead where exp says so"][0]
    assert mask_of(visible).meaning(read=False).describe() == "causal, up to 33 tokens"
    unreadable = TracedMask(lambda b, s: torch.arange(s).sort().values[:, None] >= torch.arange(s))
    with pytest.raises(UnreadableError, match="no reader"):
        unreadable.expression()
    # Each of the two sums counts along an axis of its own.
    with pytest.raises(UnreadableError, match="entries that differ"):
        TracedMask(lambda b, s: torch.ones(s, s).tril().triu().bool().cumsum(0).cumsum(1) == 1).expression()


def test_an_expression_that_is_not_the_mask_is_not_used() -> None:
    window = mask_of(lambda q, k: (k <= q) & (q - k < 20))
    meaning = read_mask_meaning(
        window.evaluate,
        thresholds=[20],
        absolute_scores=False,
        num_heads=1,
        max_length=None,
        acts=None,
        expression=mask_of(causal).expression(),
    )
    assert (meaning.describe(), meaning.evidence) == (
        "sliding window 20, up to 33 tokens",
        "probed at S = 1, 2, 5, 12, 29, 33",
    )


def test_values_that_contradict_a_proof_count_alone() -> None:
    # Equal as far as they are compared entry by entry, and different where the proven meaning is checked.
    holed = mask_of(lambda q, k: (k <= q) & ~((q == 400) & (k == 1)))
    meaning = read_mask_meaning(
        holed.evaluate,
        thresholds=[500],
        absolute_scores=False,
        num_heads=1,
        max_length=450,
        acts=None,
        expression=mask_of(causal).expression(),
    )
    assert meaning.evidence.startswith("probed") and meaning.bias.shape == (1, 450, 450)
    assert meaning.bias[0, 400, :3].tolist() == [0, -math.inf, 0]


def test_alibi_is_proven_and_its_slopes_are_exact() -> None:
    slopes = torch.tensor([0.5, 0.1, 0.0, 2.0])

    def mask(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        bias = slopes[:, None, None] * positions.float()
        return (bias + torch.full((length, length), -math.inf).triu(1)).expand(batch, -1, -1, -1)

    meaning = TracedMask(mask).meaning(4)
    assert (meaning.describe(), meaning.limit) == ("causal + ALiBi", None)
    assert torch.equal(meaning.slopes, slopes)
    # Beside a sink a bias by key is no bias by distance.
    assert "bias table" in TracedMask(mask).meaning(4, sinks=True).describe()


def relative_buckets(distance: Tensor) -> Tensor:
    """T5's buckets (arXiv:1910.10683): exact up to 16, logarithmic up to 128, one for all beyond."""
    far = 16 + (torch.log(distance.float() / 16) / math.log(128 / 16) * 16).to(torch.long)
    return torch.where(distance < 16, distance, torch.min(far, torch.full_like(far, 31)))


@pytest.mark.parametrize("max_length", [None, 100, 200_000])
def test_a_learned_bias_by_bucket_reaches_any_length(max_length: int | None) -> None:
    weights = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def mask(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        buckets = relative_buckets(-torch.min(positions[None] - positions[:, None], torch.zeros(1).long()))
        bias = torch.nn.functional.embedding(buckets, weights).permute(2, 0, 1).unsqueeze(0)
        return bias + torch.full((length, length), torch.finfo(torch.float32).min).triu(1)

    meaning = TracedMask(mask).meaning(4, sinks=True, max_length=max_length)
    assert meaning.limit == (max_length or 131072) and meaning.bias.shape == (4, meaning.limit)
    assert meaning.evidence.startswith(f"proven for every length up to {meaning.limit}")
    assert torch.equal(meaning.bias, weights[relative_buckets(torch.arange(meaning.limit))].T)


def test_windows_that_differ_between_heads_hold_at_every_length() -> None:
    windows = torch.tensor([3, 500, 20, 1])[:, None, None]
    traced = mask_of(lambda q, k: (k <= q) & (q - k < windows))
    meaning = traced.meaning(4)
    assert (meaning.describe(), meaning.limit) == ("sliding window 500 + bias by distance", None)
    assert torch.equal(meaning.bias > -math.inf, torch.arange(500) < windows[:, 0])


def test_a_bias_that_goes_on_for_ever_ends_with_its_table() -> None:
    strided = mask_of(lambda q, k: (k <= q) & ((q - k < 6) | ((q - k) % 4 == 0)))
    assert strided.meaning(max_length=99).describe().endswith("bias by distance, up to 99 tokens")


EXAMPLES = int(os.environ.get("KVPASS_MASK_EXAMPLES", "15"))  # more of them for a sweep
NUMBERS = st.sampled_from([1, 2, 3, 5, 8, 16, 30, 60])


@st.composite
def integers(draw: st.DrawFn, depth: int = 2) -> str:
    """A random whole number of (q, k), as source text."""
    if depth == 0:
        return draw(st.sampled_from(["q", "k", "q - k", "k - q"]))
    inner = draw(integers(depth=depth - 1))
    number = draw(NUMBERS)
    form = draw(st.integers(0, 9))
    return [
        f"({inner}) // {number}",
        f"({inner}) % {number}",
        f"({inner}).clamp(min={-number}, max={2 * number})",
        f"torch.minimum({inner}, {draw(integers(depth=0))})",
        f"({inner}).abs()",
        f"({inner}) * {number} - {draw(NUMBERS)}",
        f"torch.where({inner} > {number}, {draw(integers(depth=0))}, {inner})",
        f"(({inner}).float() / {number}).floor().long()",
        f"({inner}) + ({draw(integers(depth=0))})",
        f"torch.div({inner}, {number}, rounding_mode='trunc')",
    ][form]


@st.composite
def conditions(draw: st.DrawFn) -> str:
    """A random condition on (q, k)."""
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        left, right = draw(integers()), draw(st.one_of(integers(), NUMBERS.map(str)))
        parts.append(f"({left} {draw(st.sampled_from(['<', '<=', '>', '>=', '==', '!=']))} {right})")
    return draw(st.sampled_from([" & ", " | "])).join(parts)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(conditions())
@example("(q // 16 == k // 16)")
@example("(q - k < 60)")
@example("(q * 30 - 5 != 1234567)")
def test_any_index_arithmetic_is_reproduced_or_refused(condition: str) -> None:
    code = compile(f"(k <= q) & (({condition}) | (k == q))", "mask", "eval")

    def visible(q: Tensor, k: Tensor) -> Tensor:
        return eval(code, {"torch": torch, "q": q, "k": k})

    traced = mask_of(visible)
    meaning = traced.meaning(max_length=90)
    if isinstance(meaning, str):
        assert "hides every key" in meaning or "table" in meaning
        return
    assert_right(meaning, visible, 16, 30, 60, 1234567 // 30)
    expression = traced.expression()
    for length in (1, 40, 77):
        assert torch.equal(expression.matrix(length)[0].float(), traced.evaluate(1, length))
