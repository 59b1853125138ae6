"""From logits to the weights of the tokens that temperature, top-k, top-p and min-p leave."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from kvpass.types import Sampling

# How many of the most likely tokens are ranked to find the end of a nucleus, before the whole row is: most end early.
_WIDTHS = (64, 1024, 8192)


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
    kept = [min(s.top_k, vocab_size) if s.top_k > 0 else vocab_size for s in samplings]
    top_k = torch.tensor(kept, device=weights.device)
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
