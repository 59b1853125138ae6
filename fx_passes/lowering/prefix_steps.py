"""Steps of a prefix-LM: the first tokens of a sequence see one another, which a tree mask can say."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.types import StepInputs


def show_prefix(step: StepInputs, prefix: int) -> StepInputs:
    """The step, in which each of the first ``prefix`` tokens of a sequence sees the others; itself where it has none.

    Raises:
        InputError: if the step holds a part of a sequence's first ``prefix`` tokens only.
    """
    counts = step.query_start.diff()
    past = step.seq_lens - counts
    began = (counts > 0) & (past < prefix)
    if not bool(began.any()):  # waits for the device, in models that have a prefix
        return step
    if bool((began & (past > 0)).any()):
        raise InputError(f"the first {prefix} tokens of a sequence see one another: compute them in one step")
    return replace(step, tree_mask=_causal(step, counts) | _within(past, counts, prefix))


def _causal(step: StepInputs, counts: Tensor) -> Tensor:
    """What the tokens see of those of their sequence in the step, bool ``[T, M]``: a tree mask, or all before them."""
    if step.tree_mask is not None:
        return step.tree_mask
    columns = torch.arange(int(counts.max()), device=counts.device)
    tokens = torch.arange(len(step.token_ids), device=counts.device)
    return columns <= (tokens - step.query_start[:-1].repeat_interleave(counts))[:, None]


def _within(past: Tensor, counts: Tensor, prefix: int) -> Tensor:
    """Whether a token's sequence has a token of its prefix in a column, bool ``[T, M]``."""
    columns = torch.arange(int(counts.max()), device=counts.device)
    positions = past[:, None] + columns
    return ((columns < counts[:, None]) & (positions < prefix)).repeat_interleave(counts, 0)
