"""Where a token stands: rotary tables, biases by distance, sinusoids, counted positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH, VOCAB, Block, GeluMLP, RMSNorm


def rotary_angles(length: int, dim: int, device: torch.device, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each `[length, dim]`, both halves equal."""
    frequencies = base ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary on `[B, H, S, D]` that pairs dim i with dim i + D/2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on `[B, H, S, D]`, merged to `[B, S, H * D]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class ComplexRotary(nn.Module):
    """Rotary as a product of complex numbers, from a table of `torch.polar` kept as a buffer and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)
        angles = torch.outer(torch.arange(MAX_LENGTH), 50.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = pairs * self.freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(turned).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.wqkv(x).view(b, s, 3, HEADS, HEAD_DIM).unbind(2)
        q, k = self.rotate(q).transpose(1, 2), self.rotate(k).transpose(1, 2)
        mask = torch.full((s, s), float("-inf"), device=x.device).triu_(diagonal=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD_DIM) + mask
        out = F.softmax(scores.float(), dim=-1).type_as(q) @ v.transpose(1, 2)
        return self.wo(out.transpose(1, 2).contiguous().view(b, s, -1))


class ALiBi(nn.Module):
    """A slope per head times the arange difference, added to the scores (arXiv:2108.12409)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.slopes = [2 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)]

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for t in self.qkv(x).split(DIM, dim=2))
        position = torch.arange(s, device=x.device)
        distance = position[None, :] - position[:, None]
        slopes = torch.tensor(self.slopes, device=x.device).view(HEADS, 1, 1)
        bias = (slopes * distance).masked_fill(distance > 0, float("-inf"))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).flatten(2))


class LogBucketBias(nn.Module):
    """T5's learned bias by logarithmic distance bucket, unscaled scores (arXiv:1910.10683)."""

    BUCKETS, FURTHEST = 16, 40

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.relative_bias = nn.Embedding(self.BUCKETS, HEADS)

    def bucket(self, distance: Tensor) -> Tensor:
        exact = self.BUCKETS // 2
        ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.FURTHEST / exact)
        coarse = (exact + ratio * (self.BUCKETS - exact)).long().clamp(max=self.BUCKETS - 1)
        return torch.where(distance < exact, distance, coarse)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for proj in (self.q, self.k, self.v))
        distance = torch.arange(s, device=x.device)[:, None] - torch.arange(s, device=x.device)[None, :]
        bias = self.relative_bias(self.bucket(distance.clamp(min=0))).permute(2, 0, 1).unsqueeze(0)
        bias = bias + torch.where(distance < 0, torch.finfo(x.dtype).min, 0.0)
        scores = torch.matmul(q, k.transpose(3, 2)) + bias
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, DIM))


class Attention(nn.Module):
    """Plain causal attention for the models below, whose positions enter at the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.out(causal_sdpa(q, k, v))


class EmbeddedPositions(nn.Module):
    """A decoder that adds `position_vectors(input_ids)` to its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.Sequential(*(Block(Attention(), GeluMLP(DIM, 2 * DIM)) for _ in range(2)))
        self.norm = RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.position_vectors(input_ids)
        return self.head(self.norm(self.blocks(x)))


class Sinusoids(EmbeddedPositions):
    """Sines and cosines computed in forward from an arange, interleaved by stack, as faint as the embeddings."""

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], dtype=torch.float32, device=input_ids.device).unsqueeze(1)
        rates = torch.exp(torch.arange(0, DIM, 2, device=input_ids.device) * (-math.log(10000.0) / DIM))
        return 0.2 * torch.stack((torch.sin(position * rates), torch.cos(position * rates)), dim=-1).flatten(-2)


class CountedPositions(EmbeddedPositions):
    """Positions by a cumulative sum of ones, less one, into a learned table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(MAX_LENGTH, DIM)

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        return self.table(torch.ones_like(input_ids).cumsum(dim=1) - 1)


class OffsetTable(EmbeddedPositions):
    """A learned parameter `[1, L, E]`, the first two rows unused, sliced by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, MAX_LENGTH + 2, DIM))

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        return self.table[:, 2 : input_ids.size(1) + 2]


class TransposedRotaryTable(nn.Module):
    """Rotary on `[B, S, H, D]` from a cos/sin table kept for every position and indexed by position ids."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        angles = torch.arange(MAX_LENGTH)[:, None] * 30.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        self.register_buffer("cos_sin", torch.cat([angles.cos(), angles.sin()], dim=-1))

    def rotate(self, x: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = self.cos_sin[position_ids].unsqueeze(2).chunk(2, dim=-1)
        a, b = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        position_ids = torch.arange(x.size(1), device=x.device).unsqueeze(0).expand(x.size(0), -1)
        q, k, v = (proj(x).unflatten(-1, (HEADS, HEAD_DIM)) for proj in (self.q, self.k, self.v))
        q, k = self.rotate(q, position_ids), self.rotate(k, position_ids)
        return self.o(causal_sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
