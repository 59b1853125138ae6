"""One causal attention, many ways to write its mask."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.positions import rotary_angles, rotate_halves
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH


class EinsumTrilOnes(nn.Module):
    """einsum over [B, S, H, D]; `masked_fill(-inf)` where a tril of ones made on the spot is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, DIM, bias=False)
        self.wk = nn.Linear(DIM, DIM, bias=False)
        self.wv = nn.Linear(DIM, DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, HEADS, HEAD_DIM)
        k = self.wk(x).view(b, s, HEADS, HEAD_DIM)
        v = self.wv(x).view(b, s, HEADS, HEAD_DIM)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
        mask = torch.tril(torch.ones(s, s, device=x.device))
        scores = scores.masked_fill(mask == 0, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
        return self.wo(out.reshape(b, s, DIM))


class Heads(nn.Module):
    """Four projections and the split into heads; a subclass writes `attend(q, k, v)` on `[B, H, S, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM)
        self.k_proj = nn.Linear(DIM, DIM)
        self.v_proj = nn.Linear(DIM, DIM)
        self.o_proj = nn.Linear(DIM, DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q_proj(x).reshape(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).reshape(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).reshape(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).reshape(b, s, DIM))


class FullTriuFinfoMin(Heads):
    """A float mask: `torch.full` of the dtype's smallest number, `triu`, added to the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(-2)
        mask = torch.full((s, s), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(HEAD_DIM)) + mask[None, None]
        return scores.softmax(-1) @ v


class CompareAranges(Heads):
    """`torch.where` on a comparison of two aranges, -inf as a tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2], device=q.device)
        visible = i[:, None] >= i[None, :]
        scores = torch.matmul(q, k.mT) * HEAD_DIM**-0.5
        scores = torch.where(visible, scores, torch.tensor(-torch.inf, device=q.device))
        return torch.matmul(F.softmax(scores, dim=-1), v)


class MinusOneBillion(Heads):
    """The annotated-transformer mask: 1 - triu of ones, filled with -1e9 where it is zero."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        subsequent = torch.triu(torch.ones(1, s, s, device=q.device), diagonal=1).type(torch.uint8) == 0
        scores = (q / math.sqrt(HEAD_DIM)) @ k.transpose(2, 3)
        return scores.masked_fill(subsequent.unsqueeze(1) == 0, -1e9).softmax(dim=-1) @ v


class BoolBufferSDPA(Heads):
    """A boolean tril kept as a buffer, sliced and given to SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("visible", torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool).tril(), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible[:s, :s])


class BandRotary(Heads):
    """A sliding window of 9 as a band, `triu & tril` of booleans, on top of half-split rotary."""

    WINDOW = 9

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        cos, sin = rotary_angles(s, HEAD_DIM, q.device)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        ones = torch.ones(s, s, dtype=torch.bool, device=q.device)
        band = ones.tril() & ones.triu(1 - self.WINDOW)
        scores = (q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5
        scores = scores + torch.zeros(s, s, dtype=q.dtype, device=q.device).masked_fill(~band, -torch.inf)
        return torch.softmax(scores, -1) @ v


class HandWrittenSoftmax(Heads):
    """exp(x - max) over its sum, spelled out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        future = torch.triu(torch.ones(s, s, device=q.device), 1).bool()
        scores = (q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)).masked_fill(future, -torch.inf)
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return (weights / weights.sum(dim=-1, keepdim=True)) @ v


class WindowByDistance(Heads):
    """A window of 7 and the causal side, each from the matrix of distances, handed to SDPA as a float mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.size(2), device=q.device)
        distance = position.unsqueeze(1) - position.unsqueeze(0)
        hidden = torch.logical_or(distance < 0, distance > 6)
        mask = torch.zeros_like(distance, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(q.size(0), 1, -1, -1), scale=0.3)


class ChunksOfEight(Heads):
    """Block-local: a token sees the earlier tokens of its own chunk of eight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        visible = (i[:, None] // 8 == i[None, :] // 8) & (i[:, None] >= i[None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class Strided(Heads):
    """The last six tokens, and before them every fourth by distance (arXiv:1904.10509)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        distance = i[:, None] - i[None, :]
        visible = (distance >= 0) & ((distance < 6) | (distance % 4 == 0))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)).masked_fill(~visible, -torch.inf)
        return scores.softmax(-1) @ v


class WindowPerHead(Heads):
    """Each head has a window of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("windows", torch.tensor([3, 8, 20, MAX_LENGTH]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        distance = i[:, None] - i[None, :]
        visible = (distance >= 0) & (distance < self.windows[:, None, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(0))


class LearnedBiasTable(Heads):
    """A learned bias for every head and every pair of absolute positions, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(HEADS, MAX_LENGTH, MAX_LENGTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM) + 4 * self.table[:, :s, :s]
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v
