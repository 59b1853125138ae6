"""Fewer key/value heads than query heads, heads of unequal width, heads that are shared or gated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.positions import rotary_angles, rotate_halves
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS

KV_HEADS = 2
GROUP = HEADS // KV_HEADS


class Grouped(nn.Module):
    """Projections for HEADS query heads over KV_HEADS key/value heads; a subclass writes `attend`."""

    def __init__(self, kv_heads: int = KV_HEADS, value_dim: int = HEAD_DIM) -> None:
        super().__init__()
        self.kv_heads, self.value_dim = kv_heads, value_dim
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(DIM, kv_heads * HEAD_DIM, bias=False)
        self.v = nn.Linear(DIM, kv_heads * value_dim, bias=False)
        self.o = nn.Linear(HEADS * value_dim, DIM, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, S, D]`, `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]` -> `[B, H, S, Dv]`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(b, s, self.kv_heads, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(b, s, self.kv_heads, self.value_dim).transpose(1, 2)
        return self.o(self.attend(q, k, v).transpose(1, 2).reshape(b, s, HEADS * self.value_dim))


class RepeatInterleave(Grouped):
    """Rotary, then `repeat_interleave` of keys and values over the heads, then SDPA with is_causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = rotary_angles(q.size(2), HEAD_DIM, q.device)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class EnableGQA(Grouped):
    """SDPA told to group the heads by itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class ExpandReshape(Grouped):
    """`repeat_kv` as transformers writes it: unsqueeze, expand, reshape; a mask added to the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = k.shape
        k = k[:, :, None, :, :].expand(b, h, GROUP, s, d).reshape(b, h * GROUP, s, d)
        v = v[:, :, None, :, :].expand(b, h, GROUP, s, d).reshape(b, h * GROUP, s, d)
        mask = torch.triu(torch.full((s, s), -torch.inf, device=q.device), diagonal=1)
        weights = torch.matmul(q, k.transpose(2, 3)) * d**-0.5 + mask
        return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


class FiveDims(Grouped):
    """Grouped 5-D attention: q `[B, Hkv, G, S, D]` against keys with a dim of one in the group's place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, d = q.shape
        q = q.view(b, KV_HEADS, GROUP, s, d)
        scores = q @ k[:, :, None].transpose(-1, -2) / d**0.5
        future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ v[:, :, None]).view(b, HEADS, s, d)


class MultiQuery2D(nn.Module):
    """One key/value head, kept as `[B, S, D]` with no head dim at all: einsum 'bhqd,bkd->bhqk'."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, DIM, bias=False)
        self.kv = nn.Linear(DIM, 2 * HEAD_DIM, bias=False)
        self.o = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2) * HEAD_DIM**-0.5
        k, v = self.kv(x).chunk(2, dim=-1)
        causal = torch.ones((s, s), dtype=torch.bool, device=x.device).triu(1)
        scores = torch.einsum("bhqd,bkd->bhqk", q, k).masked_fill(causal, -torch.finfo(x.dtype).max)
        out = torch.einsum("bhqk,bkd->bhqd", scores.softmax(dim=-1), v)
        return self.o(out.transpose(1, 2).reshape(b, s, DIM))


class MultiQueryExpand(Grouped):
    """One key/value head, expanded over the query heads without a copy."""

    def __init__(self) -> None:
        super().__init__(kv_heads=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)


class TiledHeads(Grouped):
    """`repeat` over the head dim: query head h reads key/value head h % Hkv, not h // G."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class NarrowValues(Grouped):
    """Values of another width than keys."""

    def __init__(self) -> None:
        super().__init__(value_dim=8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class KeysAreValues(nn.Module):
    """One projection serves as key and as value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, kv, kv, is_causal=True).transpose(1, 2).flatten(2))


class GatedHeads(Grouped):
    """A sigmoid gate per head and token after the attention."""

    def __init__(self) -> None:
        super().__init__(kv_heads=HEADS)
        self.gate = nn.Linear(DIM, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for proj in (self.q, self.k, self.v))
        out = self.attend(q, k, v).transpose(1, 2) * self.gate(x).sigmoid()[..., None]
        return self.o(out.reshape(b, s, DIM))


class LatentKeys(nn.Module):
    """Keys and values expanded from one narrow latent; a rotary part of the key shared by all heads."""

    LATENT, ROTARY = 16, 8

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, HEADS * (HEAD_DIM + self.ROTARY), bias=False)
        self.down = nn.Linear(DIM, self.LATENT + self.ROTARY, bias=False)
        self.up = nn.Linear(self.LATENT, HEADS * 2 * HEAD_DIM, bias=False)
        self.o = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        cos, sin = rotary_angles(s, self.ROTARY, x.device)
        q = self.q(x).view(b, s, HEADS, -1).transpose(1, 2)
        q_plain, q_turned = q.split([HEAD_DIM, self.ROTARY], dim=-1)
        latent, k_turned = self.down(x).split([self.LATENT, self.ROTARY], dim=-1)
        k_plain, v = self.up(latent).view(b, s, HEADS, 2 * HEAD_DIM).transpose(1, 2).chunk(2, dim=-1)
        k_turned = rotate_halves(k_turned.unsqueeze(1), cos, sin).expand(b, HEADS, s, self.ROTARY)
        q = torch.cat([q_plain, rotate_halves(q_turned, cos, sin)], dim=-1)
        k = torch.cat([k_plain, k_turned], dim=-1)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, DIM))
