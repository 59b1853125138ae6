"""The naive truth agrees with torch's own attention where both speak, and with its own two halves elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kvpass.kernels.reference import naive


def test_dense_is_torchs_attention() -> None:
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 4, 9, 8, generator=random, dtype=torch.float64) for _ in range(3))
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(naive.dense_attention(query, key, value, bias, 0.3), want)


def test_a_sink_is_a_key_without_a_value() -> None:
    random = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=random, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, generator=random, dtype=torch.float64)
    more = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    bias = torch.cat((torch.zeros(1, 2, 5, 5), sinks.view(1, 2, 1, 1).expand(1, 2, 5, 1)), 3)
    want = naive.dense_attention(query, torch.cat((key, more), 2), torch.cat((value, more), 2), bias, 0.3)
    torch.testing.assert_close(naive.dense_attention(query, key, value, None, 0.3, sinks=sinks), want)


def test_paged_is_dense_with_the_mask_spelled_out(random_step: Callable[..., Any]) -> None:
    step = random_step([11, 23], [11, 7], heads=(4, 2), dims=(8, 6), block_size=4, dtype=torch.float64)
    random = torch.Generator().manual_seed(3)
    slopes, sinks = torch.rand(4, generator=random), torch.randn(4, generator=random)
    got = step.attend(naive.paged_attention, 0.4, 3.0, 5, slopes, sinks)
    for n, (length, count) in enumerate(((11, 11), (23, 7))):
        k = torch.arange(length)
        block, offset = step.block_tables[n, k // 4], k % 4
        key, value = (cache[block, :, offset].transpose(0, 1)[None] for cache in (step.key_cache, step.value_cache))
        distance = torch.arange(length - count, length)[:, None] - k
        hidden = (distance < 0) | (distance >= 5)
        bias = (-slopes.double()[:, None, None] * distance).masked_fill(hidden, -torch.inf)
        rows = slice(int(step.query_start[n]), int(step.query_start[n + 1]))
        want = naive.dense_attention(step.query[rows].transpose(0, 1)[None], key, value, bias, 0.4, 3.0, sinks)
        torch.testing.assert_close(got[rows], want[0].transpose(0, 1))


def test_a_row_that_sees_nothing_is_zero() -> None:
    query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
    bias = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf] * 3])
    out = naive.dense_attention(query, key, key, bias, 1.0, sinks=torch.zeros(1))
    assert out[0, 0, 0].all()
    assert not out[0, 0, 1].any()
