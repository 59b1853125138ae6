"""Masks as functions of length, what read-masks makes of their values, and the bias that a meaning describes."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from kvpass.fx_passes.masks.mask_meaning import read_mask_meaning
from kvpass.types import MaskMeaning

Evaluate = Callable[[int, int], Tensor]
HEADS = 4


def read(evaluate: Evaluate, *sizes: int, sinks: bool = False, max_length: int | None = None) -> MaskMeaning | str:
    """The meaning of a mask on whose entries nothing acts but their places."""
    return read_mask_meaning(
        evaluate, thresholds=sizes, absolute_scores=sinks, num_heads=HEADS, max_length=max_length, acts=None
    )


def meaning_of(evaluate: Evaluate, *thresholds: int, **options) -> MaskMeaning:
    meaning = read(evaluate, *thresholds, **options)
    assert isinstance(meaning, MaskMeaning), meaning
    return meaning


def name_of(meaning: MaskMeaning) -> str:
    """What the mask is called, its limit left out: values alone prove nothing beyond the longest probe."""
    return meaning.describe().partition(", up to")[0]


def refusal_of(evaluate: Evaluate, *thresholds: int, **options) -> str:
    reason = read(evaluate, *thresholds, **options)
    assert isinstance(reason, str), reason.describe()
    return reason


def grid(length: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(length)
    return positions[:, None], positions


def masked(
    visible: Callable[[Tensor, Tensor], Tensor], fill: float = -inf, dtype: torch.dtype = torch.float32
) -> Evaluate:
    """A mask that is 0 where ``visible(q, k)``, and ``fill`` elsewhere."""

    def evaluate(batch: int, length: int) -> Tensor:
        hidden = ~visible(*grid(length))
        return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, fill).expand(batch, 1, -1, -1)

    return evaluate


def biased(
    bias: Callable[[Tensor, Tensor], Tensor], visible: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Evaluate:
    """A bias ``bias(q, k)``, ``[Hq, S, S]``, on the keys that are visible; by default those of the past."""

    def evaluate(batch: int, length: int) -> Tensor:
        queries, keys = grid(length)
        seen = causal(queries, keys) if visible is None else visible(queries, keys)
        return bias(queries, keys).float().masked_fill(~seen, -inf)[None]

    return evaluate


def causal(queries: Tensor, keys: Tensor) -> Tensor:
    return keys <= queries


def window(size: int | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda queries, keys: (keys <= queries) & (queries - keys < size)


def per_head(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None]


def rebuilt(meaning: MaskMeaning, length: int) -> Tensor:
    """The bias ``[Hq, S, S]`` that the contract of :class:`MaskMeaning` describes."""
    queries, keys = grid(length)
    distance = (queries - keys).clamp(min=0)
    bias = torch.zeros(HEADS, length, length)
    if meaning.slopes is not None:
        assert meaning.slopes.shape == (HEADS,)
        bias = bias - meaning.slopes[:, None, None] * distance
    if meaning.bias is not None:
        bias = bias + (meaning.bias[:, distance] if meaning.bias.dim() == 2 else meaning.bias[:, :length, :length])
    visible = causal(queries, keys) if meaning.window is None else window(meaning.window)(queries, keys)
    if meaning.chunk is not None:
        visible = visible & (queries // meaning.chunk == keys // meaning.chunk)
    return bias.masked_fill(~visible, -inf)


def assert_rebuilds(meaning: MaskMeaning, evaluate: Evaluate, *lengths: int, sinks: bool = False) -> None:
    # Row constants are rounded away from long rows, so that these say how exact a value can be.
    longest = evaluate(1, max(lengths)).double()
    scale = max(1.0, float(longest.masked_fill(longest <= -9984, 0).abs().max()))
    for length in lengths:
        assert meaning.limit is None or length <= meaning.limit
        wanted = evaluate(1, length).double().expand(1, HEADS, length, length)[0]
        top = wanted.amax(-1, keepdim=True)
        hidden = wanted <= (top.clamp(min=0) if sinks else top) - 9984
        found = rebuilt(meaning, length).double()
        assert torch.equal(found == -inf, hidden)
        wanted, found = wanted.masked_fill(hidden, 0), found.masked_fill(hidden, 0)
        if not sinks:  # equal up to a constant per row: align both on the newest visible key
            newest = length - 1 - (~hidden).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
            wanted, found = wanted - wanted.gather(-1, newest), found - found.gather(-1, newest)
        assert float((wanted - found).masked_fill(hidden, 0).abs().max()) <= 1e-6 * scale
