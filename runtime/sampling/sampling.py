"""From logits to the next token of each sequence.

A row's token depends on its logits, its options, its seed and the tokens of its sequence, and on nothing else in the
batch. The random number of a draw comes from a counter-based generator, so a sequence that is preempted and computed
again goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.runtime.sampling.logit_rules import apply_rules, has_rules
from kvpass.runtime.sampling.logprobs import record_logprobs
from kvpass.runtime.sampling.random_numbers import uniform_numbers
from kvpass.runtime.sampling.token_chances import probabilities
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

# Weights looked at together, rows times vocabulary: on a CPU what stays in its caches, else what memory spares.
_CHUNK_ELEMENTS = 1 << 18
_CHUNK_ELEMENTS_ON_DEVICE = 1 << 24


def sample(logits: Tensor, sequences: Ordered[Sequence]) -> list[int | None]:
    """Choose the next token of each sequence from its row of ``logits`` ``[R, V]``.

    A sequence that asks for log-probabilities has them recorded; one for which no token can be chosen has the reason
    in ``failure``, unless its logits are to blame.

    Returns:
        One token per row; None for a row with no largest finite value, that is with NaN, +inf or nothing but -inf, and
        for one of which the options leave nothing.
    """
    if not sequences:
        return []
    options = [sequence.sampling for sequence in sequences]
    tokens = choose_plain(logits, options, [s.seed for s in sequences], [s.num_output for s in sequences])
    finite = [token is not None for token in tokens]
    ruled = [row for row, s in enumerate(options) if finite[row] and not is_plain(s)]
    logged = [row for row, s in enumerate(options) if finite[row] and s.logprobs is not None]
    for rows in _chunks(ruled, logits):
        for row, choice in zip(rows, _choose_by_rules(logits[rows], [sequences[row] for row in rows]), strict=True):
            tokens[row] = choice
    for rows in _chunks(logged, logits):
        record_logprobs(logits[rows], [sequences[row] for row in rows], [tokens[row] for row in rows])
    return tokens


def is_plain(sampling: Sampling) -> bool:
    """Whether a token depends on its logits, the seed and the number of tokens before it alone."""
    return not has_rules(sampling)


def choose_plain(
    logits: Tensor, samplings: Ordered[Sampling], seeds: Ordered[int], counters: Ordered[int]
) -> list[int | None]:
    """One token for each row of ``logits`` ``[R, V]``; for options that are not plain, the most likely one.

    ``counters`` are the numbers of tokens generated before each. None stands for a row with no largest finite value.
    """
    peaks, best = logits.max(dim=-1)
    finite: list[bool] = peaks.isfinite().tolist()
    tokens: list[int | None] = [token if usable else None for token, usable in zip(best.tolist(), finite, strict=True)]
    drawn = [row for row, s in enumerate(samplings) if finite[row] and s.temperature > 0 and is_plain(s)]
    for rows in _chunks(drawn, logits):
        uniform = uniform_numbers([seeds[row] for row in rows], [counters[row] for row in rows])
        chances = probabilities(logits[rows], [samplings[row] for row in rows])
        for row, token in zip(rows, _draw(chances, uniform).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _chunks(rows: list[int], logits: Tensor) -> list[list[int]]:
    elements = _CHUNK_ELEMENTS if logits.device.type == "cpu" else _CHUNK_ELEMENTS_ON_DEVICE
    at_once = max(1, elements // logits.shape[-1])
    return [rows[first : first + at_once] for first in range(0, len(rows), at_once)]


def _choose_by_rules(logits: Tensor, sequences: list[Sequence]) -> list[int | None]:
    """Tokens of rows whose options change the logits."""
    values, failures = apply_rules(logits, sequences)
    peaks, best = values.max(dim=-1)
    left: list[bool] = peaks.isfinite().tolist()
    tokens: list[int | None] = best.tolist()
    for row, (sequence, failure) in enumerate(zip(sequences, failures, strict=True)):
        if failure is None and not left[row]:
            failure = "the options of its sampling (logit_bias, allowed_tokens, penalties) leave no token to choose"
        if failure is not None:
            sequence.failure = failure
            tokens[row] = None
    drawn = [row for row, token in enumerate(tokens) if token is not None and sequences[row].sampling.temperature > 0]
    if drawn:
        for row, token in zip(drawn, _draw_tokens(values[drawn], [sequences[row] for row in drawn]), strict=True):
            tokens[row] = token
    return tokens


def _draw_tokens(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    uniform = uniform_numbers([s.seed for s in sequences], [s.num_output for s in sequences])
    tokens: list[int] = _draw(probabilities(logits, [s.sampling for s in sequences]), uniform).tolist()
    return tokens


def _draw(weights: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Tokens ``[R]``: the first at which the cumulative weight exceeds ``uniform`` times the whole."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # At most (1 - 2**-53) times the whole, which is less than the whole even when rounded: some token exceeds it.
    goal = torch.from_numpy(uniform).to(weights.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True)[:, 0]
