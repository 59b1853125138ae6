"""Scores that are an attention for short sequences, or at first sight, are refused where they stand."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.attention.find_attention import FindAttention
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.masks.read_masks import MASK, ReadMasks
from tests.fx_passes.tracing import Cases, captured


def parts(m: Cases, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and where keys come later."""
    s = x.size(1)
    return x.unsqueeze(1), (x @ m.square).unsqueeze(1), (x * m.vector).unsqueeze(1), torch.ones(s, s).triu(1).bool()


def with_sinks(m: Cases, x: Tensor, sinks: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    w = (q @ k.mT).masked_fill(later, -torch.inf)
    column = sinks.to(w.dtype).expand(x.size(0), 1, x.size(1), 1)
    return torch.cat([w, column], -1).softmax(-1)[..., :-1] @ v


def filled(m: Cases, x: Tensor, fill: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    return torch.where(later, fill, q @ k.mT).softmax(-1) @ v


def count(x: Tensor) -> Tensor:
    return torch.arange(x.size(1), dtype=x.dtype)


def capped_after_a_shift(m: Cases, x: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    w = q @ k.mT
    return torch.tanh(w - w.mean(-1, keepdim=True)).masked_fill(later, -torch.inf).softmax(-1) @ v


def weighed_after_a_shift(m: Cases, x: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    w = q @ k.mT
    w = (w - w.amax(-1, keepdim=True)) * F.softplus(x @ m.vector)[:, None, None]
    return w.masked_fill(later, -torch.inf).softmax(-1) @ v


def tempered(m: Cases, x: Tensor, temperature: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    return ((q @ k.mT).masked_fill(later, -torch.inf) * temperature).softmax(-1) @ v


def multiplied(m: Cases, x: Tensor, temperature: Tensor) -> Tensor:
    q, k, v, later = parts(m, x)
    seen = (~later).to(x.dtype)
    return ((q @ k.mT * seen - 1e9 * (1 - seen)) / temperature).softmax(-1) @ v


READ = {
    "a number": lambda m, x: with_sinks(m, x, torch.tensor(0.5)),
    "a tensor of the sequence's size": lambda m, x: with_sinks(m, x, torch.zeros(x.size(0), 1, x.size(1), 1) + 0.5),
    "repeated over sequences": lambda m, x: with_sinks(m, x, m.vector[:1].view(1, 1, 1, 1).repeat(x.size(0), 1, 1, 1)),
    "a learned one": lambda m, x: with_sinks(m, x, m.vector[:1].exp().view(1, 1, 1, 1) * 2),
    "a fill of the scores' size": lambda m, x: filled(m, x, torch.full_like(x @ x.mT, -1e9)[:, None]),
    "a temperature after the mask": lambda m, x: tempered(m, x, m.vector[:1].exp().view(1, 1, 1, 1)),
    "a temperature after a mask that multiplies": lambda m, x: multiplied(m, x, m.vector[:1].exp().view(1, 1, 1, 1)),
    "one by the position": lambda m, x: tempered(m, x, (1 + count(x)).log1p()[:, None]),
    "a fill that is computed": lambda m, x: filled(m, x, -1e9 * torch.ones(x.size(1), x.size(1), dtype=x.dtype)),
}
FADING = "a temperature that fades, and the mask with it"
REFUSED = {
    "sinks from the tenth token on": (
        lambda m, x: with_sinks(m, x, (count(x) - 10).clamp(min=0)[:, None]),
        "not one number for each head",
    ),
    "sinks that tokens past the tenth bring": (
        lambda m, x: with_sinks(m, x, (torch.ones_like(count(x)).sum() - 10).clamp(min=0)),
        "not one number for each head",
    ),
    "a fill that fades": (lambda m, x: filled(m, x, -1e9 / (1 + count(x)[:, None]) ** 3), "does not hide a key"),
    "a tanh after a shift": (capped_after_a_shift, "shifted before a tanh"),
    "a factor of keys after a shift": (weighed_after_a_shift, "shifted before they are multiplied"),
}


@pytest.mark.slow
def test_what_holds_for_short_sequences_alone_is_refused() -> None:
    refused = {name: function for name, (function, _) in REFUSED.items()}
    fading = {FADING: lambda m, x: tempered(m, x, 1 / (1 + count(x))[:, None])}
    graph = captured(Cases({**READ, **fading, **refused}))
    Canonicalize().apply(graph)
    found = FindAttention().apply(graph)
    assert len(attention_sites(graph)) == len(READ) + 1
    (masked,) = ReadMasks().apply(graph).refusals
    assert "negative after their mask" in masked.reason
    assert [MASK in site.meta for site in attention_sites(graph)] == [True] * len(READ) + [False]
    for refusal, (name, (_, words)) in zip(found.refusals, REFUSED.items(), strict=True):
        assert re.search(words, refusal.reason), f"{name}: {refusal.reason}"
