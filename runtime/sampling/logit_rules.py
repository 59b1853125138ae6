"""Options that change logits before a token is chosen: penalties, bias, and the tokens that a grammar allows.

Each works on its own row, element by element, so that a row comes out the same in any batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

_LARGEST = 1e30  # of a penalty, so that nothing overflows in float32, where infinity times no occurrence is NaN


def has_rules(sampling: Sampling) -> bool:
    """Whether any option changes the logits, beside those that draw from them."""
    return bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.allowed_tokens is not None
    )


def apply_rules(logits: Tensor, sequences: Ordered[Sequence]) -> tuple[Tensor, list[str | None]]:
    """Logits ``[R, V]`` as the options of each sequence change them.

    Returns:
        float32 ``[R, V]``, ``-inf`` where a token is ruled out, and for each row why its ``allowed_tokens`` failed, or
        None.
    """
    values = logits.float() if logits.dtype is not torch.float32 else logits.clone()
    options = [sequence.sampling for sequence in sequences]
    rows = [row for row, s in enumerate(options) if s.repetition_penalty != 1]
    if rows:
        values[rows] = _repetition(values[rows], [sequences[row] for row in rows])
    rows = [row for row, s in enumerate(options) if s.presence_penalty or s.frequency_penalty]
    if rows:
        values[rows] = _presence_and_frequency(values[rows], [sequences[row] for row in rows])
    for row, s in enumerate(options):
        if s.logit_bias:
            tokens = torch.tensor(list(s.logit_bias), device=values.device)
            values[row, tokens] += values.new_tensor([min(bias, _LARGEST) for bias in s.logit_bias.values()])
    failures: list[str | None] = [None] * len(options)
    for row, s in enumerate(options):
        if s.allowed_tokens is not None:
            try:
                allowed = _mask_of(s.allowed_tokens(sequences[row].output), values.shape[-1])
            except Exception as error:  # the caller's code: whatever is wrong with it ends this request alone
                failures[row] = f"allowed_tokens failed with {type(error).__name__}: {error}"
            else:
                values[row].masked_fill_(~allowed.to(values.device), -torch.inf)
    return values, failures


def _repetition(values: Tensor, sequences: list[Sequence]) -> Tensor:
    """Keskar et al., CTRL (arXiv 1909.05858), section 4.1; negative scores are multiplied, as in transformers."""
    seen = _occurrences([sequence.tokens for sequence in sequences], values) > 0
    penalty = _column(values, [sequence.sampling.repetition_penalty for sequence in sequences])
    return torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)


def _presence_and_frequency(values: Tensor, sequences: list[Sequence]) -> Tensor:
    """``logit - frequency * count - presence * (count > 0)``, counts over the output."""
    counts = _occurrences([sequence.tokens[sequence.prompt_length :] for sequence in sequences], values)
    presence = _column(values, [sequence.sampling.presence_penalty for sequence in sequences])
    frequency = _column(values, [sequence.sampling.frequency_penalty for sequence in sequences])
    return values - frequency * counts - presence * (counts > 0)


def _occurrences(tokens: list[NDArray[np.int32]], like: Tensor) -> Tensor:
    """How often each token occurs in each row's, float32 ``[R, V]``."""
    rows = np.repeat(np.arange(len(tokens)), [len(row) for row in tokens])
    places = rows * like.shape[-1] + np.concatenate(tokens)
    counts = torch.bincount(torch.from_numpy(places).to(like.device), minlength=like.numel())
    return counts.view(like.shape).to(like.dtype)


def _column(like: Tensor, numbers: list[float]) -> Tensor:
    return like.new_tensor([max(-_LARGEST, min(number, _LARGEST)) for number in numbers])[:, None]


def _mask_of(allowed: Iterable[int] | Any, vocab_size: int) -> Tensor:
    """Bool ``[V]`` of what a callback gave: ids, or a mask already.

    Raises:
        ValueError: if it cannot be used.
    """
    if isinstance(allowed, np.ndarray):
        allowed = torch.from_numpy(allowed)
    if isinstance(allowed, Tensor) and allowed.dtype is torch.bool:
        if allowed.shape != (vocab_size,):
            raise ValueError(f"it gave a mask of shape {list(allowed.shape)}: one bool for each of {vocab_size} tokens")
        return allowed
    ids = allowed.tolist() if isinstance(allowed, Tensor) else list(allowed)
    for token in ids:
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"it gave {token!r}, which is no token id: ids are 0 to {vocab_size - 1}")
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[torch.tensor(ids, dtype=torch.int64)] = True
    return mask
