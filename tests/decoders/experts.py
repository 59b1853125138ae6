"""Mixtures of experts that sort their tokens, and work on one group after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.skeleton import DIM

EXPERTS, CHOSEN = 4, 2


class SplitByExpert(nn.Module):
    """Tokens sorted by expert and split where the experts change, by sizes read off as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.zeros(EXPERTS, DIM, DIM))
        self.down = nn.Parameter(torch.zeros(EXPERTS, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        best, chosen = self.router(tokens).topk(CHOSEN, dim=1)
        marks = torch.zeros(tokens.size(0), EXPERTS, device=x.device).scatter(1, chosen, 1)
        sizes = marks.long().sum(0).tolist()
        order = chosen.flatten().sort(0).indices
        token = order.div(CHOSEN, rounding_mode="trunc")
        parts = tokens[token].split(sizes)
        hidden = torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.up, strict=True)]).relu()
        groups = zip(hidden.split(sizes), self.down, strict=True)
        worked = torch.cat([F.linear(part, weight) for part, weight in groups])
        worked = worked * best.softmax(1).flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, token, worked).view_as(x)


class BestExpert(nn.Module):
    """One expert for each token: sorted, one product per group, and put back by the inverse of the sort."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.weight = nn.Parameter(torch.zeros(EXPERTS, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        gate, chosen = self.router(tokens).softmax(-1).topk(1, dim=-1)
        order = chosen.flatten().argsort()
        sizes = F.one_hot(chosen, EXPERTS).sum((0, 1)).tolist()
        parts = tokens[order // 1].split(sizes)
        worked = torch.cat([F.gelu(part @ weight) for part, weight in zip(parts, self.weight, strict=True)])
        return (worked[order.argsort()] * gate).view_as(x)
