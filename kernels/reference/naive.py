"""The meaning of the ops, spelled out one query at a time in float64; what every kernel is tested against.

Caches are given as the numbers they stand for, ``[B, Hkv, P, D]``: of a scaled format, what its slabs dequantise to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_one(scores: Tensor, visible: Tensor, values: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of ``scores [K]`` over the visible keys, times ``values [K, Dv]``.

    Returns:
        the sum ``[Dv]``, the log-sum-exp of visible scores and sink ``[]``, the weights ``[K]``. If no key is visible
        these are zeros, ``-inf`` and zeros.
    """
    weights = torch.zeros_like(scores)
    if not visible.any():
        return weights.new_zeros(values.shape[1]), weights.new_tensor(-torch.inf), weights
    logits = scores[visible] if sink is None else torch.cat((scores[visible], sink.double().view(1)))
    log_sum = torch.logsumexp(logits, 0)
    weights[visible] = torch.exp(scores[visible] - log_sum)
    return (weights[visible, None] * values[visible]).sum(0), log_sum, weights


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
                out[n, h, q] = attend_one(scores, added[n, h, q] != -torch.inf, value[n, kv].double(), sink)[0]
    return out


def paged_attention_stats(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor,
    scale: float, softcap: float | None = None, window: int | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None, chunk: int | None = None, tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``kvpass::paged_attention_stats`` in float64: output, log-sum-exp and mass."""
    heads, (_, kv_heads, size, _) = query.shape[1], key_cache.shape
    out = torch.zeros(query.shape[0], heads, value_cache.shape[3], dtype=torch.float64)
    log_sum = torch.full(out.shape[:2], -torch.inf, dtype=torch.float64)
    mass = torch.zeros(len(seq_lens), kv_heads, block_tables.shape[1] * size, dtype=torch.float64)
    for n in range(len(seq_lens)):
        start, stop, length = int(query_start[n]), int(query_start[n + 1]), int(seq_lens[n])
        for row in range(start, stop):
            sees, q, k = _sight(length, stop - start, row - start, None if tree_mask is None else tree_mask[start:stop])
            slot = torch.arange(len(k))
            block, offset = block_tables[n, slot[sees] // size], slot[sees] % size
            k, visible = k[sees], torch.ones(int(sees.sum()), dtype=torch.bool)
            if window is not None:
                visible &= q - k < window
            if chunk is not None:
                visible &= torch.tensor([position // chunk == q // chunk for position in k.tolist()], dtype=torch.bool)
            for h in range(heads):
                kv, shown = h // (heads // kv_heads), visible
                block_, offset_ = torch.where(visible, block, block[-1:]), torch.where(visible, offset, offset[-1:])
                scores = scale * (key_cache[block_, kv, offset_].double() @ query[row, h].double())
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    scores = scores - slopes[h].double() * (q - k)
                if bias is not None:
                    of_head = bias[h if len(bias) > 1 else 0].double()
                    added = of_head[(q - k).clamp(max=bias.shape[1] - 1)] if bias.dim() == 2 else of_head[q, k]
                    scores, shown = scores + added, visible & (added != -torch.inf)
                sink = None if sinks is None else sinks[h]
                found = attend_one(scores, shown, value_cache[block_, kv, offset_].double(), sink)
                out[row, h], log_sum[row, h] = found[0], found[1]
                mass[n, kv, slot[sees]] += found[2]
    return out, log_sum, mass


def _sight(length: int, count: int, row: int, tree: Tensor | None) -> tuple[Tensor, int, Tensor]:
    """Which of a sequence's slots a new token sees, bool ``[length]``; its position; and those of the slots."""
    earlier = length - count
    positions = torch.arange(length)
    if tree is None:
        return positions <= earlier + row, earlier + row, positions
    for j in range(count):
        positions[earlier + j] = earlier + int(tree[j, :count].sum()) - 1
    sees = torch.cat((torch.ones(earlier, dtype=torch.bool), tree[row, :count]))
    return sees, int(positions[earlier + row]), positions


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor,
    scale: float, softcap: float | None = None, window: int | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None, chunk: int | None = None, tree_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kvpass::paged_attention`` in float64: ``[T, Hq, Dv]``."""
    step = (query, key_cache, value_cache, block_tables, seq_lens, query_start)
    return paged_attention_stats(*step, scale, softcap, window, slopes, sinks, bias, chunk, tree_mask)[0]


def latent_attention(
    query: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor, scale: float,
    value_dim: int, softcap: float | None = None, window: int | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """``kvpass::latent_attention`` in float64: every query head gets its own copy of keys and values."""
    keys = cache.expand(-1, query.shape[1], -1, -1)
    step = (query, keys, keys[..., :value_dim], block_tables, seq_lens, query_start)
    return paged_attention(*step, scale, softcap, window, slopes, sinks, bias, chunk)


def cascade_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor,
    shared_start: Tensor, shared_lens: Tensor, scale: float, softcap: float | None = None, window: int | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None, bias: Tensor | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """``kvpass::cascade_attention`` in float64: sharing changes no result."""
    step = (query, key_cache, value_cache, block_tables, seq_lens, query_start)
    return paged_attention(*step, scale, softcap, window, slopes, sinks, bias, chunk)


def gather_cache(cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> Tensor:
    """``kvpass::gather_cache`` in float64: ``[N, W * P, Hkv, D]``."""
    _, heads, size, width = cache.shape
    out = torch.zeros(len(seq_lens), block_tables.shape[1] * size, heads, width, dtype=torch.float64)
    for n, length in enumerate(seq_lens.tolist()):
        for k in range(length):
            out[n, k] = cache[block_tables[n, k // size], :, k % size].double()
    return out


def norm_rotary(
    rows: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> Tensor:
    """What ``kvpass::norm_rotary_write`` does to queries or keys ``[T, H, D]``, in float64."""
    out = rows.double().clone()
    if weight is not None:
        out = out / torch.sqrt((out**2).mean(2, keepdim=True) + eps) * weight.double()
    if cos is None or sin is None:
        return out
    before, width = out.clone(), cos.shape[1]
    for d in range(width):
        if interleaved:
            other, sign = (d + 1, -1) if d % 2 == 0 else (d - 1, 1)
        else:
            other, sign = (d + width // 2, -1) if d < width // 2 else (d - width // 2, 1)
        out[:, :, d] = before[:, :, d] * cos[:, d, None] + sign * before[:, :, other] * sin[:, d, None]
    return out
