"""Attention over whole sequences in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.kernels.reference.scores import SCORE_BYTES, budget, compute_dtype, weigh


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``kvpass::dense_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    batch, heads, rows, _ = query.shape
    groups = (key.shape[1], heads // key.shape[1])
    if key.shape[2] == 0:
        return query.new_zeros(batch, heads, rows, value.shape[3])
    compute = compute_dtype(query)
    grouped = query.to(compute).mul(scale).unflatten(1, groups)
    out = query.new_empty(batch, *groups, rows, value.shape[3])
    if bias is not None:
        bias = bias.to(compute).expand(batch, heads, rows, key.shape[2]).unflatten(1, groups)
    if sinks is not None:
        sinks = sinks.to(compute).view(*groups, 1, 1)
    step = max(1, budget(SCORE_BYTES, query) // (compute.itemsize * heads * key.shape[2]))
    for n in range(batch):
        keys, values = key[n].to(compute).transpose(1, 2), value[n].to(compute)
        for first in range(0, rows, step):
            piece = slice(first, first + step)
            scores = torch.bmm(grouped[n, :, :, piece].flatten(1, 2), keys).unflatten(1, (groups[1], -1))
            weights = weigh(scores, softcap, None if bias is None else bias[n, :, :, piece], None, sinks)
            out[n, :, :, piece] = torch.bmm(weights.flatten(1, 2), values).unflatten(1, (groups[1], -1))
    return out.flatten(1, 2)
