"""First stages of a random attention: projections into heads, norms and positions of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.grammar.shape import MAX_LENGTH, Heads, Part


def three_linears(m: Part, x: Tensor) -> Heads:
    def split(name: str, heads: int, dim: int) -> Tensor:
        y = F.linear(x, m.weight(name, heads * dim, m.e), m.weight(name + "_b", heads * dim, spread=0.1))
        return y.view(x.size(0), x.size(1), heads, dim).transpose(1, 2)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def unflattened(m: Part, x: Tensor) -> Heads:
    def split(name: str, heads: int, dim: int) -> Tensor:
        return (x @ m.weight(name, m.e, heads * dim)).unflatten(-1, (heads, dim)).permute(0, 2, 1, 3).contiguous()

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def dims_before_heads(m: Part, x: Tensor) -> Heads:
    """Features are `(dim, head)`: a head's numbers lie apart."""

    def split(name: str, heads: int, dim: int) -> Tensor:
        return F.linear(x, m.weight(name, heads * dim, m.e)).unflatten(-1, (dim, heads)).permute(0, 3, 1, 2)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def einsum_projection(m: Part, x: Tensor) -> Heads:
    def split(name: str, heads: int, dim: int) -> Tensor:
        return torch.einsum("bse,ehd->bhsd", x, m.weight(name, m.e, heads, dim))

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def weight_per_head(m: Part, x: Tensor) -> Heads:
    """`x[:, None] @ w[H, E, D]`: a batched product over heads."""

    def split(name: str, heads: int, dim: int) -> Tensor:
        return x.unsqueeze(1) @ m.weight(name, heads, m.e, dim)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def stacked_linears(m: Part, x: Tensor) -> Heads:
    """One small linear per head, stacked."""

    def split(name: str, heads: int, dim: int) -> Tensor:
        return torch.stack([F.linear(x, m.weight(f"{name}{i}", dim, m.e)) for i in range(heads)], dim=1)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def convolved(m: Part, x: Tensor) -> Heads:
    """1x1 convolutions, channels first."""

    def split(name: str, heads: int, dim: int) -> Tensor:
        y = F.conv1d(x.transpose(1, 2), m.weight(name, heads * dim, m.e, 1))
        return y.unflatten(1, (heads, dim)).transpose(2, 3)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def addmm_packed(m: Part, x: Tensor) -> Heads:
    """GPT-2's Conv1D on flattened rows, then `split`."""
    sizes = [m.h * m.d, m.kv * m.d, m.kv * m.dv]
    flat = torch.addmm(m.weight("b", sum(sizes), spread=0.1), x.view(-1, m.e), m.weight("w", m.e, sum(sizes)))
    parts = flat.view(x.size(0), x.size(1), sum(sizes)).split(sizes, dim=2)
    q, k, v = (
        p.view(x.size(0), x.size(1), n, -1).transpose(1, 2) for p, n in zip(parts, (m.h, m.kv, m.kv), strict=True)
    )
    return Heads(x, q, k, v)


def sliced_packed(m: Part, x: Tensor) -> Heads:
    """One linear, cut by slices."""
    a, b, c = m.h * m.d, m.kv * m.d, m.kv * m.dv
    y = F.linear(x, m.weight("w", a + b + c, m.e))
    parts = (y[..., :a], y[..., a : a + b], y[..., -c:])
    q, k, v = (
        p.reshape(x.size(0), -1, n, p.size(-1) // n).swapaxes(1, 2)
        for p, n in zip(parts, (m.h, m.kv, m.kv), strict=True)
    )
    return Heads(x, q, k, v)


def time_first(m: Part, x: Tensor) -> Heads:
    """`[S, B, E]` and heads merged into the batch on the way."""
    t = x.transpose(0, 1)
    s, b, _ = t.shape

    def split(name: str, heads: int, dim: int) -> Tensor:
        y = F.linear(t, m.weight(name, heads * dim, m.e)).contiguous().view(s, b * heads, dim)
        return y.transpose(0, 1).view(b, heads, s, dim)

    return Heads(x, split("q", m.h, m.d), split("k", m.kv, m.d), split("v", m.kv, m.dv))


def packed_three_first(m: Part, x: Tensor) -> Heads:
    """`[B, S, 3, H, D]`, unbound; multi-head only."""
    q, k, v = F.linear(x, m.weight("w", 3 * m.h * m.d, m.e)).view(*x.shape[:2], 3, m.h, m.d).unbind(2)
    return Heads(x, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def packed_permuted(m: Part, x: Tensor) -> Heads:
    """`[3, B, H, S, D]` by one permute, indexed: timm's way."""
    b, s, _ = x.shape
    y = F.linear(x, m.weight("w", 3 * m.h * m.d, m.e)).reshape(b, s, 3, m.h, m.d).permute(2, 0, 3, 1, 4)
    return Heads(x, y[0], y[1], y[2])


def packed_head_first(m: Part, x: Tensor) -> Heads:
    """`[B, S, H, 3, D]`: q, k, v side by side within a head."""
    y = F.linear(x, m.weight("w", 3 * m.h * m.d, m.e)).view(*x.shape[:2], m.h, 3, m.d)
    return Heads(x, *(y[..., i, :].transpose(1, 2) for i in range(3)))


def packed_within_head(m: Part, x: Tensor) -> Heads:
    """`[B, S, H, 3 * D]`, chunked."""
    q, k, v = (
        F.linear(x, m.weight("w", 3 * m.h * m.d, m.e)).view(*x.shape[:2], m.h, 3 * m.d).transpose(1, 2).chunk(3, -1)
    )
    return Heads(x, q, k, v)


def packed_last(m: Part, x: Tensor) -> Heads:
    """`[B, S, H, D, 3]`: q, k, v interleaved number by number."""
    q, k, v = F.linear(x, m.weight("w", 3 * m.h * m.d, m.e)).view(*x.shape[:2], m.h, m.d, 3).unbind(-1)
    return Heads(x, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def packed_groups(m: Part, x: Tensor) -> Heads:
    """`[B, S, Hkv, G + 2, D]`: each group's queries, then its key and value (Falcon, InternLM)."""
    b, s, _ = x.shape
    y = F.linear(x, m.weight("w", m.kv * (m.group + 2) * m.d, m.e)).view(b, s, m.kv, m.group + 2, m.d)
    q = y[..., : m.group, :].reshape(b, s, m.h, m.d)
    return Heads(x, q.transpose(1, 2), y[..., -2, :].transpose(1, 2), y[..., -1, :].transpose(1, 2))


def keys_and_values_packed(m: Part, x: Tensor) -> Heads:
    q = F.linear(x, m.weight("q", m.h * m.d, m.e)).unflatten(-1, (m.h, m.d)).transpose(1, 2)
    kv = F.linear(x, m.weight("kv", m.kv * (m.d + m.dv), m.e)).unflatten(-1, (m.kv, m.d + m.dv)).transpose(1, 2)
    return Heads(x, q, kv[..., : m.d], kv[..., m.d :])


ANY_HEADS = {
    "three linears": three_linears,
    "unflattened": unflattened,
    "dims before heads": dims_before_heads,
    "einsum projection": einsum_projection,
    "weight per head": weight_per_head,
    "stacked linears": stacked_linears,
    "convolved": convolved,
    "addmm, split": addmm_packed,
    "packed, sliced": sliced_packed,
    "time first": time_first,
    "keys and values packed": keys_and_values_packed,
}
EQUAL_WIDTHS = {"packed by groups": packed_groups}
MULTI_HEAD = {
    "packed [3, H, D]": packed_three_first,
    "packed, permuted": packed_permuted,
    "packed [H, 3, D]": packed_head_first,
    "packed [H, 3D]": packed_within_head,
    "packed [H, D, 3]": packed_last,
}
PROJECTIONS = {**ANY_HEADS, **EQUAL_WIDTHS, **MULTI_HEAD}


def _rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rms_per_head(m: Part, t: Heads) -> None:
    t.q = _rms(t.q, m.weight("qn", m.d, around=1.0, spread=0.1))
    t.k = _rms(t.k, m.weight("kn", m.d, around=1.0, spread=0.1))


def torch_rms(m: Part, t: Heads) -> None:
    t.q = F.rms_norm(t.q, (m.d,), m.weight("qn", m.d, around=1.0, spread=0.1))
    t.k = F.rms_norm(t.k, (m.d,), m.weight("kn", m.d, around=1.0, spread=0.1))


def rms_in_float(m: Part, t: Heads) -> None:
    """Upcast, norm by sqrt and division, cast back, weight last (Llama's order)."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        return weight * (y / torch.sqrt(y.square().mean(dim=-1, keepdim=True) + 1e-5)).to(x.dtype)

    t.q, t.k = norm(t.q, m.weight("qn", m.d, around=1.0)), norm(t.k, m.weight("kn", m.d, around=1.0))


def layer_norm_per_head(m: Part, t: Heads) -> None:
    t.q = m.made("qn", nn.LayerNorm(m.d))(t.q)
    t.k = m.made("kn", nn.LayerNorm(m.d))(t.k)


def weights_per_head(m: Part, t: Heads) -> None:
    """Layer norm without weights, then a weight for each head and dim (Cohere)."""
    t.q = F.layer_norm(t.q, (m.d,)) * m.weight("qn", m.h, 1, m.d, around=1.0)
    t.k = F.layer_norm(t.k, (m.d,)) * m.weight("kn", m.kv, 1, m.d, around=1.0)


def rms_over_all_heads(m: Part, t: Heads) -> None:
    """The norm runs over all heads together (OLMo2)."""

    def norm(x: Tensor, name: str) -> Tensor:
        flat = x.transpose(1, 2).flatten(2)
        return (
            _rms(flat, m.weight(name, flat.size(-1), around=1.0))
            .view(x.size(0), x.size(2), x.size(1), -1)
            .transpose(1, 2)
        )

    t.q, t.k = norm(t.q, "qn"), norm(t.k, "kn")


def unit_length(m: Part, t: Heads) -> None:
    scale = m.weight("temperature", m.h, 1, 1, around=1.5, spread=0.3)
    t.q, t.k = F.normalize(t.q, dim=-1) * scale, F.normalize(t.k, dim=-1)


def divided_by_norm(m: Part, t: Heads) -> None:
    t.q = 2.0 * t.q / t.q.norm(dim=-1, keepdim=True)
    t.k = t.k / torch.linalg.vector_norm(t.k, dim=-1, keepdim=True).clamp_min(1e-6)


NORMS = {
    "none": lambda m, t: None,
    "rms per head": rms_per_head,
    "F.rms_norm": torch_rms,
    "rms in float32": rms_in_float,
    "layer norm": layer_norm_per_head,
    "weights per head": weights_per_head,
    "rms over all heads": rms_over_all_heads,
    "unit length": unit_length,
    "divided by norm": divided_by_norm,
}


def _angles(m: Part, length: int, dim: int, device: torch.device) -> Tensor:
    rates = 10.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    return torch.arange(length, device=device).float()[:, None] * rates


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotary_halves(m: Part, t: Heads) -> None:
    angles = _angles(m, t.length, m.d, t.x.device)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    t.q, t.k = (y * cos + _rotate_half(y) * sin for y in (t.q, t.k))


def rotary_interleaved(m: Part, t: Heads) -> None:
    angles = _angles(m, t.length, m.d, t.x.device)
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    t.q, t.k = (y * cos + torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2) * sin for y in (t.q, t.k))


def rotary_complex(m: Part, t: Heads) -> None:
    turn = torch.polar(torch.ones(()), _angles(m, t.length, m.d, t.x.device))

    def rotate(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).type_as(y)

    t.q, t.k = rotate(t.q), rotate(t.k)


def rotary_table(m: Part, t: Heads) -> None:
    """A table in a buffer, looked up by position ids."""
    angles = _angles(m, MAX_LENGTH, m.d, torch.device("cpu"))
    cos = m.constant("cos", torch.cat([angles, angles], -1).cos())
    sin = m.constant("sin", torch.cat([angles, angles], -1).sin())
    ids = torch.arange(t.length, device=t.x.device).unsqueeze(0)
    t.q, t.k = (y * cos[ids][:, None] + _rotate_half(y) * sin[ids][:, None] for y in (t.q, t.k))


def rotary_partial(m: Part, t: Heads) -> None:
    half = m.d // 2
    angles = _angles(m, t.length, half, t.x.device)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    t.q, t.k = (
        torch.cat([y[..., :half] * cos + _rotate_half(y[..., :half]) * sin, y[..., half:]], -1) for y in (t.q, t.k)
    )


def learned_table(m: Part, t: Heads) -> None:
    """A learned vector per position, added to queries and keys."""
    table = m.weight("places", MAX_LENGTH, m.d)
    t.q, t.k = t.q + table[: t.length], t.k + F.embedding(torch.arange(t.length, device=t.x.device), table)


POSITIONS = {
    "none": lambda m, t: None,
    "rotary halves": rotary_halves,
    "rotary interleaved": rotary_interleaved,
    "rotary complex": rotary_complex,
    "rotary table": rotary_table,
    "rotary partial": rotary_partial,
    "learned table": learned_table,
}
