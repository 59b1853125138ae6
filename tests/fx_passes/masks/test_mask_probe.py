"""What has to be true of a mask before anyone asks what it means, and the reasons given where it is not."""

import math
from collections.abc import Callable
from math import inf

import pytest
import torch
from torch import Tensor

from kvpass.fx_passes.masks import mask_probe
from kvpass.fx_passes.masks.mask_probe import MaskProbe, NotProvenError

Evaluate = Callable[[int, int], Tensor]
HEADS = 4
AHEAD = "the mask lets the query at position {} see the key at position {}, which comes later"


def probed(evaluate: Evaluate, *lengths: int, sinks: bool = False) -> MaskProbe:
    probe = MaskProbe(evaluate, HEADS, sinks)
    for length in lengths or mask_probe.SMALL_LENGTHS:
        probe.extend(length)
    return probe


def refusal_of(evaluate: Evaluate, *lengths: int, sinks: bool = False) -> str:
    with pytest.raises(NotProvenError) as raised:
        probed(evaluate, *lengths, sinks=sinks)
    return str(raised.value)


def masked(visible: Callable[[Tensor, Tensor], Tensor], fill: float = -inf) -> Evaluate:
    def evaluate(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        seen = visible(positions[:, None], positions)
        return torch.zeros(seen.shape).masked_fill(~seen, fill)

    return evaluate


def causal_mask(length: int) -> Tensor:
    return torch.full((length, length), -inf).triu(1)


@pytest.mark.parametrize("shape", ["", "h", "bh", "bhqk"])
def test_a_mask_may_leave_axes_to_broadcasting(shape: str) -> None:
    def evaluate(batch: int, length: int) -> Tensor:
        sizes = {"": (), "h": (1,), "bh": (1, 1), "bhqk": (batch, HEADS)}[shape]
        return causal_mask(length).expand(*sizes, length, length).clone()

    assert torch.equal(probed(evaluate).largest.values, causal_mask(33)[None])


def test_the_future_is_refused_with_its_first_place() -> None:
    assert refusal_of(masked(lambda q, k: k <= q + 1)) == AHEAD.format(0, 1)
    assert refusal_of(masked(lambda q, k: (k <= q) | ((q == 3) & (k == 4)))) == AHEAD.format(3, 4)
    assert refusal_of(masked(lambda q, k: (k <= q) | ((q == 900) & (k > 1000))), 2000) == AHEAD.format(900, 1001)
    assert refusal_of(masked(lambda q, k: (k <= q) | (k < 4))) == AHEAD.format(0, 1)  # prefix-LM
    assert refusal_of(lambda batch, length: torch.zeros(1)) == AHEAD.format(0, 1)  # an encoder
    one_head = torch.tensor([0, 0, 2, 0])[:, None, None]
    assert refusal_of(masked(lambda q, k: k <= q + one_head)) == AHEAD.format(0, 1)


def test_a_bias_on_the_future_is_no_mask() -> None:
    def symmetric(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        return -0.5 * (positions[:, None] - positions).abs()

    assert refusal_of(symmetric) == AHEAD.format(0, 1)


def test_a_key_that_is_lowered_but_not_hidden_is_refused_with_advice() -> None:
    reason = refusal_of(masked(lambda q, k: k <= q, -1000))
    assert reason == AHEAD.format(0, 1) + "; it only lowers that score by 1000: write -inf to hide a key"


def test_a_key_counts_as_hidden_from_1e4_below_the_row_maximum() -> None:
    for fill in (-1e4, float(torch.tensor(-1e4, dtype=torch.bfloat16)), -65504, -inf):
        for row in (0.0, 7.0, -300.0):
            values = probed(lambda b, s, f=fill, r=row: torch.full((s, s), f).triu(1) + r).largest.values
            assert torch.equal(values[0], causal_mask(33))
    assert "comes later" in refusal_of(masked(lambda q, k: k <= q, -9983))
    # Beside a sink the scores are absolute, so that a row may hide all its keys.
    lowered = torch.full((9, 9), -20000.0).triu(1)
    lowered[4] = -1e4
    assert bool((probed(lambda b, s: lowered[:s, :s], 5, sinks=True).largest.values[0, 4] == -inf).all())


def test_a_query_that_sees_nothing_is_refused_unless_there_is_a_sink() -> None:
    for fill in (-inf, torch.finfo(torch.float32).min):
        blind = masked(lambda q, k: (k <= q) & (q != 3), fill)
        assert "hides every key from the query at position 3" in refusal_of(blind)
        assert bool((probed(blind, sinks=True).largest.values[0, 3] == -inf).all())


@pytest.mark.parametrize("at", [2, 3])
def test_sequences_of_a_batch_must_be_equal(at: int) -> None:
    def evaluate(batch: int, length: int) -> Tensor:
        mask = causal_mask(length).repeat(batch, 1, 1, 1)
        if batch == at:
            mask[-1, :, 4:, 1:2] = -inf
        return mask

    reason = refusal_of(evaluate)
    assert "differs between sequences of a batch: at length 5, for the query at position 4 and the key at" in reason
    assert f"it is hidden in sequence {at - 1} of {at}, 0 in a batch of one" in reason


def test_the_size_of_the_batch_must_not_count() -> None:
    def evaluate(batch: int, length: int) -> Tensor:
        return causal_mask(length) - batch * (torch.arange(length) == 1)

    assert "it is 2 in sequence 0 of 2, 1 in a batch of one" in refusal_of(evaluate)


def test_a_pair_of_positions_keeps_its_value_when_the_sequence_grows() -> None:
    def scaled(batch: int, length: int) -> Tensor:
        positions = torch.arange(length)
        return causal_mask(length) + (positions - positions[:, None]) / length

    reason = refusal_of(scaled)
    assert "for the query at position 1 and the key at position 0 it is -0.5 with 2 tokens, -0.2 with 5" in reason
    shifted = lambda batch, length: causal_mask(length) + 0.1 * length  # noqa: E731
    assert torch.equal(probed(shifted).largest.values[0], causal_mask(33))
    assert "depends on the length" in refusal_of(shifted, sinks=True)


def test_what_cannot_be_evaluated_is_refused_with_the_error() -> None:
    def only_one(batch: int, length: int) -> Tensor:
        if batch > 1:
            raise RuntimeError("batch is one\nsecond line")
        return causal_mask(length)

    assert refusal_of(only_one) == "the mask cannot be evaluated for batch 2 and length 1: RuntimeError: batch is one"
    reason = refusal_of(lambda batch, length: torch.zeros(3, length, length))
    assert "for batch 1 and length 1: its shape (3, 1, 1) does not broadcast to (1, 4, 1, 1)" in reason
    assert "length 1: AttributeError" in refusal_of(lambda batch, length: 0.0)  # type: ignore[arg-type,return-value]
    for bad in (math.nan, inf):
        assert "NaN or +inf for the query at position 1" in refusal_of(masked(lambda q, k: (k != 1) | (q != 1), bad))


def test_the_largest_length_that_can_be_evaluated_is_found() -> None:
    buffer = causal_mask(300)
    before = buffer.clone()
    calls = []

    def evaluate(batch: int, length: int) -> Tensor:
        calls.append(length)
        return buffer[:length, :length]

    probe = probed(evaluate, 2, 5, 4105)
    assert (probe.fails_at, probe.largest.length, probe.lengths) == (301, 300, {1, 2, 5, 300})
    assert len(calls) < 40
    assert probe.extend(8192) is probe.largest
    assert torch.equal(buffer, before)


def test_every_size_is_exceeded_by_a_probe() -> None:
    sizes = [1, 7, 8, 12, 20, 29, 30, 64, 511, 512, 513, 4096, 8192, 8200]
    lengths = mask_probe.probe_lengths(sizes, mask_probe.LONGEST)
    assert max(lengths) <= mask_probe.LONGEST
    for size in sizes:
        assert any(size < length <= size + mask_probe.BEYOND for length in lengths)
    assert mask_probe.probe_lengths([100_000], 50) == [1, 2, 5, 12, 33]
