"""What else may happen to the scores: soft caps, norms, sinks, a second attention taken away."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, RMSNorm


def split_heads(x: Tensor, dim: int = HEAD_DIM) -> Tensor:
    """`[B, S, H * D]` -> `[B, H, S, D]`."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def future(s: int, device: torch.device) -> Tensor:
    """True where a key is later than the query, `[s, s]`."""
    return torch.arange(s, device=device).unsqueeze(0) > torch.arange(s, device=device).unsqueeze(1)


class SoftcapAndNorms(nn.Module):
    """RMSNorm on queries and keys, scores capped by a tanh before the mask."""

    CAP = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        scores = self.q_norm(q) @ self.k_norm(k).transpose(-2, -1)
        scores = self.CAP * torch.tanh(scores / self.CAP)
        scores = scores.masked_fill(future(x.size(1), x.device), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class SinkColumn(nn.Module):
    """A learned logit per head, joined as one more column and dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.matmul(q, k.transpose(2, 3)) * HEAD_DIM**-0.5
        scores = scores.masked_fill(future(s, x.device), torch.finfo(x.dtype).min)
        scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(b, -1, s, 1)], dim=-1)
        weights = scores.softmax(-1)[..., :-1]
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(b, s, DIM))


class SinkGate(nn.Module):
    """The sink of a head as a gate on its output, by the log-sum-exp of the scores; or on its weights, keys first."""

    def __init__(self, spelling: str = "sigmoid") -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.matmul(q, k.transpose(2, 3)) * HEAD_DIM**-0.5
        scores = scores.masked_fill(future(x.size(1), x.device), -torch.inf)
        if self.spelling == "keys first":
            scores = scores.permute(3, 0, 1, 2)
            gate = torch.sigmoid(scores.logsumexp(0) - self.sinks[:, None])
            return self.out(torch.einsum("kbhq,bhkd->bqhd", scores.softmax(0) * gate, v).flatten(2))
        if self.spelling == "sigmoid":
            gate = torch.sigmoid(torch.logsumexp(scores, dim=-1) - self.sinks.view(1, -1, 1)).unsqueeze(-1)
        else:
            total = torch.logsumexp(scores, dim=-1, keepdim=True)
            gate = torch.exp(total - torch.logaddexp(total, self.sinks[:, None, None]))
        return self.out((torch.matmul(scores.softmax(-1), v) * gate).transpose(1, 2).flatten(2))


class Differential(nn.Module):
    """Two whole attentions, the second subtracted with a learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, 2 * DIM)
        self.v, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.weight = nn.Parameter(torch.full((HEADS, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = (split_heads(part) for part in self.q(x).chunk(2, dim=-1))
        k1, k2 = (split_heads(part) for part in self.k(x).chunk(2, dim=-1))
        v = split_heads(self.v(x))
        first = F.scaled_dot_product_attention(q1, k1, v, is_causal=True)
        second = F.scaled_dot_product_attention(q2, k2, v, is_causal=True)
        return self.out((first - self.weight * second).transpose(1, 2).flatten(2))


class PerHeadTemperature(nn.Module):
    """A learned temperature per head on cosine similarities, in place of 1 / sqrt(D)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.log_temperature = nn.Parameter(torch.linspace(0.5, 2.0, HEADS))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = (q @ k.transpose(-1, -2)) * self.log_temperature.exp()[:, None, None]
        scores = scores.masked_fill(future(x.size(1), x.device), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class DataTemperature(nn.Module):
    """A temperature from each token: for its scores as a query, for those it gets as a key, or for its weights."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.temperature = nn.Linear(DIM, HEADS)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        temperature = F.softplus(self.temperature(x)).transpose(1, 2)
        scores = q @ k.mT * HEAD_DIM**-0.5
        if self.of == "query":
            scores = scores * temperature.unsqueeze(-1)
        elif self.of == "key":
            scores = scores / temperature.unsqueeze(-2)
        elif self.of == "query after the mask":
            scores = scores.masked_fill(future(x.size(1), x.device), -torch.inf) * temperature.unsqueeze(-1)
        elif self.of == "bias":
            scores = scores + temperature.unsqueeze(-2)
        weights = scores.masked_fill(future(x.size(1), x.device), -torch.inf).softmax(-1)
        if self.of == "weights":
            weights = weights * temperature.unsqueeze(-1)
        elif self.of == "weights that are moved":
            moved = (weights * temperature.unsqueeze(-1)).permute(1, 0, 2, 3).flatten(0, 1)
            out = torch.bmm(moved, v.transpose(0, 1).flatten(0, 1))
            return self.out(out.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2))
        elif self.of == "weights of a key":
            weights = weights * temperature.unsqueeze(-2)
        elif self.of == "weights by the scores":
            weights = weights * scores.sigmoid()
        return self.out((weights @ v).transpose(1, 2).flatten(2))
