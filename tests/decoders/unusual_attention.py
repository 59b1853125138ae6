"""Causal attentions in unusual dress. kvpass may refuse them, and may learn them; it must not get them wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.masks import Heads
from tests.decoders.scores import future, split_heads
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH, VOCAB, RMSNorm


class OffByOneSoftmax(Heads):
    """exp over one plus the sum of exp: a sink of logit zero, written by hand."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future(q.size(2), q.device), -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=0)
        weights = (scores - largest).exp()
        return weights / (weights.sum(-1, keepdim=True) + (-largest).exp()) @ v


class Differential(nn.Module):
    """Two softmaxes over halves of the heads, the second subtracted before the values (arXiv:2410.05258)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.weight = nn.Parameter(torch.full((1,), 0.6))
        self.norm = RMSNorm(2 * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = split_heads(self.q(x)).chunk(2, dim=1)
        k1, k2 = split_heads(self.k(x)).chunk(2, dim=1)
        v = split_heads(self.v(x), 2 * HEAD_DIM)
        hidden = future(x.size(1), x.device)
        first = (q1 @ k1.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        second = (q2 @ k2.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        out = (first - self.weight * second) @ v
        return self.out(self.norm(out).transpose(1, 2).flatten(2))


class MaskedAfterSoftmax(Heads):
    """A softmax over all keys, multiplied by the mask, divided by what is left."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(-1) * ~future(q.size(2), q.device)
        return weights / weights.sum(-1, keepdim=True) @ v


class MaskedExp(Heads):
    """exp with nothing taken off, times the mask, over its sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * HEAD_DIM**-0.5).exp() * torch.ones(q.size(2), q.size(2), device=q.device).tril()
        return weights / weights.sum(-1, keepdim=True) @ v


class MultipliedMask(Heads):
    """Scores times the mask, less a large number times its complement, as the first GPT was written."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.size(2), q.size(2), device=q.device).tril()
        scores = q @ k.mT * HEAD_DIM**-0.5
        return (scores * mask - 1e9 * (1 - mask)).softmax(-1) @ v


class ExpOfLogSoftmax(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future(q.size(2), q.device), -torch.inf)
        return scores.log_softmax(-1).exp() @ v


class SigmoidWeights(Heads):
    """A sigmoid in place of the softmax (arXiv:2409.04431)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * HEAD_DIM**-0.5 - 1.5).masked_fill(future(q.size(2), q.device), -torch.inf)
        return scores.sigmoid() @ v


class NullKey(Heads):
    """A learned key and value before the first token's, which every token sees."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(2, HEADS, 1, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s = q.size(0), q.size(2)
        k = torch.cat([self.null[0].expand(b, -1, -1, -1), k], dim=2)
        v = torch.cat([self.null[1].expand(b, -1, -1, -1), v], dim=2)
        visible = F.pad(~future(s, q.device), (1, 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class BiasKeyOfTorch(nn.Module):
    """nn.MultiheadAttention with a learned key and value, and a key and value of zeros, after the last token's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=future(x.size(1), x.device), need_weights=False)[0]


class KeysByDistance(Heads):
    """A learned vector per distance, multiplied with the query (arXiv:1803.02155)."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Embedding(MAX_LENGTH, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        relative = self.distances((i[:, None] - i[None, :]).clamp(min=0))
        scores = (q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, relative)) * HEAD_DIM**-0.5
        return scores.masked_fill(future(q.size(2), q.device), -torch.inf).softmax(-1) @ v


class ForgetGates(Heads):
    """Each token fades the tokens before it by a gate computed from itself (arXiv:2503.02130)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HEAD_DIM, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        faded = F.logsigmoid(self.gate(v)).squeeze(-1).cumsum(-1)
        bias = faded.unsqueeze(-1) - faded.unsqueeze(-2)
        scores = q @ k.mT * HEAD_DIM**-0.5 + bias
        return scores.masked_fill(future(q.size(2), q.device), -torch.inf).softmax(-1) @ v


class BeginsWithALearnedToken(nn.Module):
    """A learned vector put before the sequence, and its output dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.begin = nn.Parameter(torch.zeros(1, 1, DIM))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.cat([self.begin.expand(input_ids.size(0), -1, -1), self.embed(input_ids)], dim=1)
        hidden = future(x.size(1), x.device)
        x = x + self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0]
        return self.head(x[:, 1:])
