"""From logits to the next token of each sequence.

A row's token depends on its logits, its options, its seed and the number of tokens it has generated, and on nothing
else in the batch. The random number of a draw comes from a counter-based generator, so a sequence that is preempted
and computed again goes on as if nothing had happened, and no generator state has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.runtime.sequence import Sequence
from kvpass.types import Sampling

# Weights looked at together, rows times vocabulary: on a CPU what stays in its caches, else what memory spares.
_CHUNK_ELEMENTS = 1 << 18
_CHUNK_ELEMENTS_ON_DEVICE = 1 << 24
# How many of the most likely tokens are ranked to find the end of a nucleus, before the whole row is: most end early.
_WIDTHS = (64, 1024, 8192)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def sample(logits: Tensor, sequences: Ordered[Sequence]) -> list[int | None]:
    """Choose the next token of each sequence from its row of ``logits`` ``[R, V]``.

    Returns:
        One token per row; None for a row with no largest finite value, that is with NaN, +inf or nothing but -inf.
    """
    if not sequences:
        return []
    peaks, best = logits.max(dim=-1)
    finite: list[bool] = peaks.isfinite().tolist()
    tokens: list[int] = best.tolist()
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0 and finite[row]]
    elements = _CHUNK_ELEMENTS if logits.device.type == "cpu" else _CHUNK_ELEMENTS_ON_DEVICE
    rows_at_once = max(1, elements // logits.shape[-1])
    for first in range(0, len(drawn), rows_at_once):
        rows = drawn[first : first + rows_at_once]
        chosen = [sequences[row] for row in rows]
        uniform = uniform_numbers([s.seed for s in chosen], [s.num_output for s in chosen])
        chances = probabilities(logits[rows], [s.sampling for s in chosen])
        for row, token in zip(rows, _draw(chances, uniform).tolist(), strict=True):
            tokens[row] = token
    return [token if usable else None for token, usable in zip(tokens, finite, strict=True)]


def uniform_numbers(seeds: Ordered[int], counters: Ordered[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair of a seed and a counter.

    SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) at a place of its sequence
    that is found directly; seeds are mixed first, so that neighbouring ones have nothing in common.
    """
    state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GOLDEN)
    state += (np.array(counters, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def probabilities(logits: Tensor, samplings: Ordered[Sampling]) -> Tensor:
    """The weights ``[R, V]`` of all tokens, 0 for those that the options rule out; not normalised.

    Temperature comes first, then ``top_k``, then ``top_p`` on what is left, then ``min_p``. Of equally likely tokens
    at the edge the lower ids are kept.
    """
    values = logits.float()
    temperature = values.new_tensor([s.temperature for s in samplings]).clamp(1e-30, 1e30)
    # Relative to the largest, so that a tiny temperature overflows to no more than -inf.
    scaled = (values - values.amax(-1, keepdim=True)) / temperature[:, None]
    weights = torch.softmax(scaled, dim=-1)
    kept = weights
    if any(s.min_p > 0 for s in samplings):
        min_p = weights.new_tensor([s.min_p for s in samplings])
        kept = torch.where(weights >= (min_p * weights.amax(-1))[:, None], weights, 0.0)
    cut = [row for row, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1]
    if cut:
        mask = _keep_top(weights[cut], [samplings[row] for row in cut])
        kept[cut] = torch.where(mask, kept[cut], 0.0)
    return kept


def _keep_top(weights: Tensor, samplings: Ordered[Sampling]) -> Tensor:
    """Mask ``[R, V]`` of the ``top_k`` largest weights, and of those the fewest that reach ``top_p`` of their sum."""
    vocab_size = weights.shape[-1]
    top_k = torch.tensor([min(s.top_k or vocab_size, vocab_size) for s in samplings], device=weights.device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=weights.device)
    total = weights.sum(-1, dtype=torch.float64)
    count = torch.empty_like(top_k)
    threshold = torch.empty_like(weights[:, 0])
    rows = torch.arange(len(samplings), device=weights.device)
    for width in (*(width for width in _WIDTHS if width < vocab_size), vocab_size):
        ranked = weights[rows].topk(width).values
        ends = _end_of_nucleus(ranked, top_k[rows], top_p[rows], total[rows], vocab_size)
        count[rows], threshold[rows], certain = ends
        rows = rows[~certain]
        if len(rows) == 0:
            break
    above = weights > threshold[:, None]
    tied = weights == threshold[:, None]
    return above | (tied & (tied.cumsum(-1) <= (count - above.sum(-1))[:, None]))


def _end_of_nucleus(
    ranked: Tensor, top_k: Tensor, top_p: Tensor, total: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the ``ranked`` weights are kept, the smallest of these, and whether that is certain.

    It is not when ``ranked``, the largest weights of each row in descending order, is too short to tell.
    """
    width = ranked.shape[-1]
    reached = ranked.cumsum(-1, dtype=torch.float64)
    last = (top_k.clamp_max(width) - 1)[:, None]
    sum_of_k = torch.where(top_k <= width, reached.gather(-1, last)[:, 0], total)
    goal = torch.where(top_p < 1, top_p * sum_of_k, torch.inf)
    # Tokens before the goal is reached, and the one that reaches it.
    count = torch.minimum((reached < goal[:, None]).sum(-1) + 1, top_k)
    certain = (count <= width) & ((top_k <= width) | (top_k == vocab_size))
    threshold = ranked.gather(-1, (count.clamp_max(width) - 1)[:, None])[:, 0]
    return count, threshold, certain


def _draw(weights: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Tokens ``[R]``: the first at which the cumulative weight exceeds ``uniform`` times the whole."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # At most (1 - 2**-53) times the whole, which is less than the whole even when rounded: some token exceeds it.
    goal = torch.from_numpy(uniform).to(weights.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True)[:, 0]


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
