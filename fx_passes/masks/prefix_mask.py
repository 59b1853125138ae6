"""Masks of a prefix-LM: the first tokens see one another, and all else is causal (UniLM, arXiv 1905.03197).

What the mask shows of the prefix is taken out and the rest read as any mask is, which then has to be causal. So the
prefix is known by its values up to the longest length that is probed, where these depend on their places alone; for all
lengths it is proven of the mask's expression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvpass.fx_passes.masks.mask_probe import HIDDEN_BELOW, NotProvenError, probe_lengths, unproven
from kvpass.fx_passes.masks.prove_mask import MaskExpression, proves_prefix
from kvpass.types import MaskMeaning

Evaluate = Callable[[int, int], Tensor]
# A prefix is looked for in sequences of up to this many tokens.
LONGEST_PREFIX = 1100


def find_prefix(evaluate: Evaluate, sizes: list[int]) -> int | None:
    """How many first tokens see one another, where all else is causal; None where that is not so, or not constant."""
    for length in probe_lengths(sizes, LONGEST_PREFIX):
        try:
            bias = evaluate(1, length).float()
        except Exception:  # the graph is the user's, so any error can come out of it
            return None
        shown = bias > bias.amax(-1, keepdim=True) - HIDDEN_BELOW
        first = int(shown.expand(*shown.shape[:-2], length, length)[..., 0, :].sum(-1).max())
        if 1 < first < length and bool((shown == _shown(first, length, bias.device)).all()):
            return first
    return None


def without_prefix(evaluate: Evaluate, prefix: int) -> Evaluate:
    """The mask in which the tokens of the prefix see none that come later.

    It raises :class:`NotProvenError` at a length where they do not see one another, each as it sees itself.
    """

    def reduced(batch: int, length: int) -> Tensor:
        bias = evaluate(batch, length)
        own = bias.expand(*bias.shape[:-2], length, length).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        positions = torch.arange(length, device=bias.device)
        within = (positions > positions[:, None]) & (positions < prefix)
        if bool((within & (bias != own)).any()):
            raise NotProvenError(
                f"the first {prefix} tokens see one another, but in one of {length} tokens not as each sees itself"
            )
        return bias.masked_fill(within, -torch.inf)

    return reduced


def with_prefix(
    meaning: MaskMeaning,
    prefix: int,
    evaluate: Evaluate,
    expression: MaskExpression | None,
    absolute_scores: bool,
    acts: str | None,
) -> MaskMeaning | str:
    """The meaning of a mask of which ``meaning`` is left without its prefix, or why it cannot be used.

    What ``acts`` on its entries beside their places makes a proof necessary.
    """
    if any(one is not None for one in (meaning.reach, meaning.slopes, meaning.bias)):
        return (
            f"the first {prefix} tokens see one another (prefix-LM), and the rest of the mask is {meaning.describe()}: "
            "only a causal one goes with a prefix"
        )
    if (
        expression is None
        or not _agrees(expression, prefix, evaluate)
        or not proves_prefix(expression, prefix, absolute_scores)
    ):
        if acts is not None:
            return unproven(acts)
        return replace(meaning, prefix=prefix, evidence=f"{meaning.evidence}, the prefix too")
    reach = "every length" if expression.limit is None else f"every length up to {expression.limit}"
    return replace(meaning, prefix=prefix, limit=expression.limit, evidence=f"proven for {reach}; {meaning.evidence}")


def _agrees(expression: MaskExpression, prefix: int, evaluate: Evaluate) -> bool:
    """Whether the expression shows what the graph does, at a few lengths."""
    for length in (1, 2, 7, prefix - 1, prefix, prefix + 1, 2 * prefix + 5):
        if 0 < length <= LONGEST_PREFIX and (expression.limit is None or length <= expression.limit):
            bias, read = evaluate(1, length), expression.matrix(length)
            wanted = _shown(prefix, length, bias.device)
            for one in (bias, read.to(bias.device)):
                shown = one > one.amax(-1, keepdim=True) - HIDDEN_BELOW
                if not bool((shown == wanted).all()):
                    return False
    return True


def _shown(prefix: int, length: int, device: torch.device) -> Tensor:
    """Whether the query of a row sees the key of a column, bool ``[S, S]``."""
    positions = torch.arange(length, device=device)
    return positions <= positions[:, None].clamp(min=prefix - 1)
