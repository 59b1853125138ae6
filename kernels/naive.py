"""The meaning of the attention ops, spelled out one query at a time in float64; what every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_one(scores: Tensor, visible: Tensor, values: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax of ``scores [K]`` over the visible keys, times ``values [K, Dv]``; zeros if no key is visible."""
    scores, values = scores[visible], values[visible]
    weights = torch.exp(scores - scores.amax()) if len(scores) else scores
    total = weights.sum()
    if sink is not None and len(scores):
        total = total + torch.exp(sink.double() - scores.amax())
    return (weights[:, None] * values).sum(0) / (total if len(scores) else 1.0)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kvpass::dense_attention`` in float64: ``[N, Hq, Sq, Dv]``."""
    batch, heads, rows, _ = query.shape
    out = torch.zeros(batch, heads, rows, value.shape[3], dtype=torch.float64)
    added = torch.zeros(()) if bias is None else bias
    added = added.double().expand(batch, heads, rows, key.shape[2])
    for n in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            for q in range(rows):
                scores = scale * (key[n, kv].double() @ query[n, h, q].double())
                scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + added[n, h, q]
                sink = None if sinks is None else sinks[h]
                out[n, h, q] = attend_one(scores, added[n, h, q] != -torch.inf, value[n, kv].double(), sink)
    return out


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor,
    scale: float, softcap: float | None = None, window: int | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kvpass::paged_attention`` in float64: ``[T, Hq, Dv]``."""
    heads, size = query.shape[1], key_cache.shape[2]
    out = torch.zeros(query.shape[0], heads, value_cache.shape[3], dtype=torch.float64)
    for n in range(len(seq_lens)):
        start, stop, length = int(query_start[n]), int(query_start[n + 1]), int(seq_lens[n])
        for row in range(start, stop):
            q = length - (stop - start) + row - start
            k = torch.arange(q + 1)
            block, offset = block_tables[n, k // size], k % size
            for h in range(heads):
                kv = h // (heads // key_cache.shape[1])
                scores = scale * (key_cache[block, kv, offset].double() @ query[row, h].double())
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                visible = torch.ones(q + 1, dtype=torch.bool) if window is None else q - k < window
                if slopes is not None:
                    scores = scores - slopes[h].double() * (q - k)
                if bias is not None:
                    of_head = bias[h if len(bias) > 1 else 0].double()
                    added = of_head[(q - k).clamp(max=bias.shape[1] - 1)] if bias.dim() == 2 else of_head[q, k]
                    scores, visible = scores + added, visible & (added != -torch.inf)
                sink = None if sinks is None else sinks[h]
                out[row, h] = attend_one(scores, visible, value_cache[block, kv, offset].double(), sink)
    return out
