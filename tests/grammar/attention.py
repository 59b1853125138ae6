"""The middle stages of a random attention: repeated heads, scale, scores in many layouts, softmax, values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.grammar.shape import Frame, Heads, Part


def repeat_interleaved(m: Part, y: Tensor) -> Tensor:
    return y.repeat_interleave(m.group, dim=1)


def repeat_expanded(m: Part, y: Tensor) -> Tensor:
    b, h, s, d = y.shape
    return y[:, :, None].expand(b, h, m.group, s, d).reshape(b, h * m.group, s, d)


def repeat_tiled(m: Part, y: Tensor) -> Tensor:
    return y.repeat(1, m.group, 1, 1)


def repeat_indexed(m: Part, y: Tensor) -> Tensor:
    return y[:, torch.arange(m.h, device=y.device) // m.group]


def repeat_joined(m: Part, y: Tensor) -> Tensor:
    return torch.cat([y] * m.group, dim=1)


def repeat_stacked(m: Part, y: Tensor) -> Tensor:
    return torch.stack([y] * m.group, dim=2).flatten(1, 2)


REPEATS: dict[str, Callable[[Part, Tensor], Tensor]] = {
    "repeat_interleave": repeat_interleaved,
    "expand and reshape": repeat_expanded,
    "tiled": repeat_tiled,
    "indexed": repeat_indexed,
    "joined": repeat_joined,
    "stacked": repeat_stacked,
}


# How the scale is applied: to queries and keys before the product, and to scores after it.
def _on_queries(m: Part, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * m.d**-0.5, k


def _on_keys(m: Part, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k / math.sqrt(m.d)


def _on_both(m: Part, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * m.d**-0.25, k * m.d**-0.25


def _per_head(m: Part, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * m.weight("temperature", m.h, 1, 1, around=0.6, spread=0.1), k


SCALES_BEFORE = {"on queries": _on_queries, "on keys": _on_keys, "on both": _on_both, "weight per head": _per_head}
SCALES_AFTER: dict[str, Callable[[Part, Tensor], Tensor]] = {
    "times": lambda m, s: s * m.d**-0.5,
    "divided": lambda m, s: s / math.sqrt(m.d),
    "divided by a tensor": lambda m, s: s / torch.sqrt(torch.tensor(float(m.d), device=s.device)),
    "times a buffer": lambda m, s: s * m.constant("scale", torch.tensor(m.d**-0.5)),
    "in place": lambda m, s: s.mul_(m.d**-0.5),
    "true divide": lambda m, s: torch.true_divide(s, m.d**0.5),
    "negated twice": lambda m, s: -(s * -(m.d**-0.5)),
    "divided twice": lambda m, s: s / 2 / (m.d**0.5 / 2),
}
SCALES = (*SCALES_BEFORE, *SCALES_AFTER, "none")

CAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "times tanh": lambda s: 3.0 * torch.tanh(s / 3.0),
    "tanh in steps": lambda s: (s * 0.25).tanh() * 4.0,
}


# Layouts of the scores: each gives them, their frame, and what takes weights and values to [B, H, S, Dv].
def _plain_frame() -> Frame:
    return Frame(-1, 4, lambda bias: bias)


def matmul(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    return torch.matmul(t.q, t.k.transpose(-1, -2)), _plain_frame()


def transposed_twice(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    return t.q @ t.k.permute(0, 1, 3, 2), _plain_frame()


def einsum(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    return torch.einsum("bhqd,bhkd->bhqk", t.q, t.k), _plain_frame()


def multiplied_and_summed(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    return (t.q.unsqueeze(3) * t.k.unsqueeze(2)).sum(-1), _plain_frame()


def heads_last(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B, Q, K, H]`."""
    scores = torch.einsum("bhqd,bhkd->bqkh", t.q, t.k)
    return scores, Frame(2, 4, lambda bias: bias.permute(1, 2, 0))


def queries_before_heads(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B, Q, H, K]`."""
    scores = torch.einsum("bqhd,bkhd->bqhk", t.q.transpose(1, 2), t.k.transpose(1, 2))
    return scores, Frame(3, 4, lambda bias: bias.transpose(0, 1))


def keys_times_queries(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B, H, K, Q]`."""
    return t.k @ t.q.mT, Frame(2, 4, lambda bias: bias.transpose(-1, -2))


def merged(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B * H, Q, K]` by bmm."""
    b, h, s, _ = t.q.shape
    scores = torch.bmm(t.q.reshape(b * h, s, -1), t.k.reshape(b * h, s, -1).transpose(1, 2))
    return scores, Frame(-1, 3, lambda bias: bias if bias.size(0) == 1 else bias.repeat(b, 1, 1))


def baddbmm(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B * H, Q, K]` by baddbmm into nothing, back in four dims."""
    b, h, s, _ = t.q.shape
    empty = torch.empty(b * h, s, s, device=t.q.device)
    scores = torch.baddbmm(empty, t.q.reshape(b * h, s, -1), t.k.reshape(b * h, s, -1).mT, beta=0, alpha=1.0)
    return scores.view(b, h, s, s), _plain_frame()


def heads_first(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[H, B, Q, K]`."""
    scores = t.q.transpose(0, 1) @ t.k.transpose(0, 1).transpose(-1, -2)
    return scores, Frame(-1, 4, lambda bias: bias.unsqueeze(1))


def five_dims(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B, Hkv, G, Q, K]`; keys are not repeated."""
    q = t.q.unflatten(1, (m.kv, m.group))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, t.k)
    return scores, Frame(-1, 5, lambda bias: bias if bias.size(0) == 1 else bias.unflatten(0, (m.kv, m.group)))


def group_rows(m: Part, t: Heads) -> tuple[Tensor, Frame]:
    """Scores `[B, Hkv, G, Q, K]` by one matmul with a dim of one; keys are not repeated."""
    scores = t.q.unflatten(1, (m.kv, m.group)) @ t.k.unsqueeze(2).mT
    return scores, Frame(-1, 5, lambda bias: bias if bias.size(0) == 1 else bias.unflatten(0, (m.kv, m.group)))


REPEATED_SCORES = {
    "matmul": matmul,
    "matmul, permuted": transposed_twice,
    "einsum": einsum,
    "multiplied and summed": multiplied_and_summed,
    "heads last": heads_last,
    "queries before heads": queries_before_heads,
    "keys times queries": keys_times_queries,
    "merged": merged,
    "baddbmm": baddbmm,
    "heads first": heads_first,
}
GROUPED_SCORES = {"five dims": five_dims, "group rows": group_rows}
SCORES = {**REPEATED_SCORES, **GROUPED_SCORES}


def _weighted(m: Part, scores: str, weights: Tensor, v: Tensor) -> Tensor:
    """Weights times values, back to `[B, H, S, Dv]`, in the layout that the scores have."""
    match scores:
        case "matmul":
            return weights @ v
        case "matmul, permuted":
            return torch.matmul(v.mT, weights.mT).mT
        case "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        case "multiplied and summed":
            return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(dim=3)
        case "heads last":
            return torch.einsum("bqkh,bhkd->bhqd", weights, v)
        case "queries before heads":
            return torch.einsum("bqhk,bkhd->bqhd", weights, v.transpose(1, 2)).transpose(1, 2)
        case "keys times queries":
            return weights.transpose(-1, -2) @ v
        case "merged":
            b, h, s, d = v.shape
            return torch.bmm(weights, v.reshape(b * h, s, d)).view(b, h, s, d)
        case "baddbmm":
            return torch.matmul(weights, v)
        case "heads first":
            return (weights @ v.transpose(0, 1)).transpose(0, 1)
        case "five dims":
            return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).flatten(1, 2)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def weighted(m: Part, weights: Tensor, t: Heads) -> Tensor:
    return _weighted(m, m.spec["scores"], weights, t.v)


def _column(m: Part, scores: Tensor, frame: Frame) -> Tensor:
    """A learned logit per head beside the keys of the scores."""
    sinks = frame.place(m.weight("sinks", m.h, 1, 1, around=0.5, spread=0.5))
    sizes = list(scores.shape)
    sizes[frame.keys] = 1
    return sinks.expand(sizes)


def by_hand(m: Part, s: Tensor, f: Frame) -> Tensor:
    e = torch.exp(s - s.amax(f.keys, keepdim=True))
    return e / e.sum(f.keys, keepdim=True)


def by_hand_with_a_little(m: Part, s: Tensor, f: Frame) -> Tensor:
    weights = torch.exp(s - s.amax(f.keys, keepdim=True))
    return weights / (weights.sum(f.keys, keepdim=True) + 1e-8)


def by_hand_unshifted(m: Part, s: Tensor, f: Frame) -> Tensor:
    e = s.exp()
    return e / torch.sum(e, dim=f.keys, keepdim=True)


def by_log_sum_exp(m: Part, s: Tensor, f: Frame) -> Tensor:
    return (s - torch.logsumexp(s, dim=f.keys, keepdim=True)).exp()


def by_log_of_sum(m: Part, s: Tensor, f: Frame) -> Tensor:
    """The log-sum-exp written out as well."""
    return torch.exp(s - torch.log(torch.sum(torch.exp(s), f.keys, keepdim=True)))


def by_shifted_log_of_sum(m: Part, s: Tensor, f: Frame) -> Tensor:
    top = s.max(dim=f.keys, keepdim=True).values.detach()
    return torch.exp(s - (top + (s - top).exp().sum(f.keys, keepdim=True).log()))


def sink_column(m: Part, s: Tensor, f: Frame) -> Tensor:
    joined = torch.cat([s, _column(m, s, f)], dim=f.keys)
    return joined.softmax(f.keys).narrow(f.keys, 0, s.size(f.keys))


def sink_column_first(m: Part, s: Tensor, f: Frame) -> Tensor:
    joined = torch.cat([_column(m, s, f), s], dim=f.keys)
    joined = joined - joined.max(dim=f.keys, keepdim=True).values
    return F.softmax(joined, dim=f.keys).narrow(f.keys, 1, s.size(f.keys))


def sink_in_denominator(m: Part, s: Tensor, f: Frame) -> Tensor:
    sink = _column(m, s, f)
    e = s.exp()
    return e / (e.sum(f.keys, keepdim=True) + sink.exp())


def sink_in_shifted_denominator(m: Part, s: Tensor, f: Frame) -> Tensor:
    sink = _column(m, s, f)
    top = torch.maximum(s.amax(f.keys, keepdim=True), sink)
    e = (s - top).exp()
    return e / (e.sum(f.keys, keepdim=True) + (sink - top).exp())


def off_by_one(m: Part, s: Tensor, f: Frame) -> Tensor:
    e = s.exp()
    return e / (1 + e.sum(f.keys, keepdim=True))


def off_by_one_shifted(m: Part, s: Tensor, f: Frame) -> Tensor:
    top = s.amax(f.keys, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return e / (e.sum(f.keys, keepdim=True) + (-top).exp())


def scaled_by_sigmoid(m: Part, s: Tensor, f: Frame) -> Tensor:
    """Softmax times `sigmoid(lse - sink)`: a sink written as a gate (gpt-oss's other form)."""
    lse = torch.logsumexp(s, f.keys, keepdim=True)
    return s.softmax(f.keys) * torch.sigmoid(lse - _column(m, s, f))


def masked_again(m: Part, s: Tensor, f: Frame) -> Tensor:
    return s.softmax(f.keys) * f.seen


def filled_again(m: Part, s: Tensor, f: Frame) -> Tensor:
    return F.softmax(s, dim=f.keys).masked_fill(~f.seen, 0.0)


def renormalised(m: Part, s: Tensor, f: Frame) -> Tensor:
    w = torch.where(f.seen, s.softmax(f.keys), 0.0)
    return w / w.sum(f.keys, keepdim=True)


def gated_exp(m: Part, s: Tensor, f: Frame) -> Tensor:
    e = f.seen.to(s.dtype) * torch.exp(s - s.amax(f.keys, keepdim=True))
    return e * e.sum(f.keys, keepdim=True).reciprocal()


def base_two(m: Part, s: Tensor, f: Frame) -> Tensor:
    e = torch.exp2(s * 1.4426950408889634)
    return e / e.sum(f.keys).unsqueeze(f.keys)


SOFTMAXES: dict[str, Callable[[Part, Tensor, Frame], Tensor]] = {
    "softmax": lambda m, s, f: s.softmax(f.keys),
    "F.softmax in float32": lambda m, s, f: F.softmax(s, dim=f.keys, dtype=torch.float32).to(s.dtype),
    "upcast": lambda m, s, f: torch.softmax(s.float(), dim=f.keys).type_as(s),
    "float64": lambda m, s, f: torch.softmax(s.double(), dim=f.keys).to(s.dtype),
    "nn.Softmax": lambda m, s, f: torch.nn.Softmax(dim=f.keys)(s),
    "special.softmax": lambda m, s, f: torch.special.softmax(s, f.keys),
    "exp of log_softmax": lambda m, s, f: F.log_softmax(s, dim=f.keys).exp(),
    "less the maximum": lambda m, s, f: (s - s.max(dim=f.keys, keepdim=True)[0]).softmax(f.keys),
    "by hand": by_hand,
    "by hand, unshifted": by_hand_unshifted,
    "by hand, a little in the sum": by_hand_with_a_little,
    "by log-sum-exp": by_log_sum_exp,
    "by log of sum": by_log_of_sum,
    "by shifted log of sum": by_shifted_log_of_sum,
    "dropout off": lambda m, s, f: F.dropout(s.softmax(f.keys), 0.3, training=m.training),
    "nan to zero": lambda m, s, f: s.softmax(f.keys).nan_to_num(0.0),
    "masked again": masked_again,
    "filled again": filled_again,
    "renormalised": renormalised,
    "gated exp": gated_exp,
    "base two": base_two,
    "divided after values": lambda m, s, f: (s - s.amax(f.keys, keepdim=True)).exp(),
    "sink column": sink_column,
    "sink column first": sink_column_first,
    "sink in denominator": sink_in_denominator,
    "sink in shifted denominator": sink_in_shifted_denominator,
    "off by one": off_by_one,
    "off by one, shifted": off_by_one_shifted,
    "sink by sigmoid": scaled_by_sigmoid,
}
