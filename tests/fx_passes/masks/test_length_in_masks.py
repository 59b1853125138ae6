"""Masks that are something else at single lengths, where no probe looks: refused, or they end before that length.

The oracle is the mask itself at the lengths named beside it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kvpass.fx_passes.masks import mask_meaning
from kvpass.fx_passes.masks.mask_meaning import read_mask_meaning
from kvpass.fx_passes.symbolic.entry_reader import EntryReader
from kvpass.fx_passes.symbolic.extents import depends_on_extent_only
from kvpass.fx_passes.symbolic.index_terms import KEY, QUERY, UnreadableError, at_most, less, whole
from kvpass.fx_passes.symbolic.prove_terms import Prover, Reach
from kvpass.types import MaskMeaning
from tests.fx_passes.mask_tracing import TracedMask

Mask = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def near_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_meaning, "ROUNDED_FROM", ())
    monkeypatch.setattr(mask_meaning, "LONGEST", 600)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def d(s: int) -> Tensor:
    return torch.arange(s)[:, None] - torch.arange(s)


def length(s: int) -> Tensor:
    return torch.full((), s)


def cut(s: int, when: Tensor) -> Tensor:
    """Causal, and a window of 8 at some lengths."""
    return (d(s) >= 0) & ~(when & (d(s) >= 8))


def meaning(mask: Mask) -> MaskMeaning | str:
    traced = TracedMask(lambda batch, tokens: mask(tokens))
    try:
        return traced.meaning()
    except UnreadableError:
        return traced.meaning(read=False)


# Name: a mask, a length at which it is another one, and how the reason begins.
CHANGES = "the mask depends on the length of the sequence"
UNPROVEN = "the mask may change with the length of the sequence"
REFUSED: dict[str, tuple[Mask, str]] = {
    "window at multiples of 64": (lambda s: (d(s) >= 0) & (d(s) < 8 + 1000 * (s % 64)), CHANGES),
    "cut at 100": (lambda s: cut(s, length(s) == 100), CHANGES),
    "cut in a band": (lambda s: cut(s, length(s) // 80 == 5), CHANGES),
    "the future at 100": (lambda s: (d(s) >= 0) | (length(s) == 100), "the mask lets the query at position 0 see"),
    "cut at 100, rolled by nothing": (lambda s: torch.roll(cut(s, length(s) == 100), 0, 0), UNPROVEN),
    "cut at squares": (lambda s: cut(s, (length(s) % 7 == 0) & (length(s).float().sqrt() % 1 == 0)), UNPROVEN),
    "cut where nothing is left": (lambda s: cut(s, ~torch.ones((s % 67 + 66) // 67).any()), UNPROVEN),
    "cut by a fraction of the length": (
        lambda s: cut(s, (torch.full((), s / 97) > 1) & (torch.full((), s / 97) < 1.02)),
        UNPROVEN,
    ),
    "stride of two in a band": (lambda s: (d(s) >= 0) & (d(s) % (1 + (length(s) // 80 == 5).long()) == 0), CHANGES),
    "bias in a band": (
        lambda s: torch.where(d(s) >= 0, -0.5 * d(s) * (length(s) // 80 == 5), -torch.inf),
        UNPROVEN,
    ),
    "slopes that are steeper in a band": (
        lambda s: torch.where(d(s) >= 0, -0.5 * d(s) * (1 + (length(s) // 100 == 2)), -torch.inf),
        UNPROVEN,
    ),
    "a prefix that is longer at 100": (
        lambda s: (d(s) >= 0) | (torch.arange(s) < 5 + 4 * (length(s) == 100)),
        UNPROVEN,
    ),
    "from the end by sums": (
        lambda s: (d(s) >= 0) & (((d(s) >= 0).sum(0) <= 90) | (d(s) < 8)),
        UNPROVEN,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_is_another_one_at_some_length_is_refused(name: str) -> None:
    mask, beginning = REFUSED[name]
    found = meaning(mask)
    assert isinstance(found, str), found.describe()
    assert found.startswith((beginning, CHANGES))


def test_where_no_probe_reaches_the_limit_ends_below_the_refutation() -> None:
    found = meaning(lambda s: cut(s, length(s) // 100 == 70))
    assert isinstance(found, MaskMeaning)
    assert (found.describe(), found.limit) == ("causal, up to 6999 tokens", 6999)
    assert found.evidence.endswith("proven up to 6999, and something else beyond")
    table = meaning(lambda s: (d(s) >= 0) & ((d(s) % 3 == 0) | (length(s) // 100 == 70)))
    assert isinstance(table, MaskMeaning)
    assert table.bias is not None and table.limit == 2048


def test_a_table_that_the_length_cannot_change_is_kept_though_the_length_is_a_number() -> None:
    found = meaning(lambda s: (d(s) >= 0) & ((d(s) % 3 == 0) | (d(s) >= s)))
    assert isinstance(found, MaskMeaning), found
    assert found.bias is not None and found.evidence.endswith("proven to keep its entries up to 2048")


def test_a_prefix_by_values_needs_entries_that_follow_from_places() -> None:
    prefix = TracedMask(lambda batch, s: torch.roll((d(s) >= 0) | (torch.arange(s) < 5), 0, 0))
    found = prefix.meaning(read=False)
    assert isinstance(found, MaskMeaning) and found.prefix == 5
    acts = "`roll` works along it"
    reason = read_mask_meaning(
        prefix.evaluate, thresholds=[5], absolute_scores=False, num_heads=1, max_length=None, acts=acts
    )
    assert reason == f"{UNPROVEN}: {acts}, and no proof for every length was found"


def test_values_that_contradict_an_expression_prove_nothing() -> None:
    other = TracedMask(lambda batch, s: (d(s) >= 0) & (d(s) < 20))
    reason = read_mask_meaning(
        TracedMask(lambda batch, s: d(s) >= 0).evaluate,
        thresholds=[20],
        absolute_scores=False,
        num_heads=1,
        max_length=None,
        acts="`roll` works along it",
        expression=other.expression(),
    )
    assert isinstance(reason, str) and reason.startswith(UNPROVEN)


def test_refuted_and_undecided_are_told_apart() -> None:
    prover = Prover()
    causal = at_most(KEY, QUERY)
    assert prover.holds_up_to(causal, [causal]) == Reach(2**22)
    assert prover.holds_up_to(causal, [causal]).limit is None
    assert prover.holds_up_to(less(QUERY, whole(100))) == Reach(100, 101)
    assert prover.holds_up_to(less(QUERY, whole(100)), longest=90).limit is None
    assert prover.holds_up_to(causal) == Reach(1, 2)


def test_sums_are_read_where_they_count_the_keys_that_are_seen() -> None:
    traced = TracedMask(lambda batch, s: (d(s) >= 0).sum(-1)[:, None] > torch.arange(s))
    assert traced.meaning().describe() == "causal"
    with pytest.raises(UnreadableError, match="entries that differ"):
        TracedMask(lambda batch, s: (d(s) >= 0).sum(0)[:, None] > torch.arange(s)).expression()


def test_a_reader_and_extents_agree_on_what_a_view_of_bits_is() -> None:
    traced = TracedMask(lambda batch, s: torch.arange(s).view(torch.float64)[:, None] >= torch.arange(s))
    reader = EntryReader(traced.captured, traced.evaluator, Prover())
    (view,) = (n for n in traced.captured.graph.nodes if n.target is torch.ops.aten.view.dtype)
    with pytest.raises(UnreadableError, match="bits"):
        reader.entry(view, (QUERY,))
    assert depends_on_extent_only(traced.evaluator, traced.bias) == "`view` reads bits of other numbers"


def test_a_refutation_that_the_values_do_not_show_leaves_no_gap_in_what_is_known() -> None:
    """The size of a table is refuted at 500, where only hidden keys change: nothing is read of an older matrix."""

    def mask(s: int) -> Tensor:
        hidden = torch.where(length(s) == 500, -3e38, -2e38)
        return torch.where((d(s) >= 0) & ((d(s) % 3 == 0) | (d(s) > 450)), 0.0, hidden)

    found = meaning(mask)
    if isinstance(found, MaskMeaning):
        assert found.limit is not None and found.bias is not None
        assert bool((found.bias[0, 451 : found.limit] == 0).all())
