"""Attentions that take heads apart after the softmax, and small things that people write around one."""

import torch
from torch import Tensor

from tests.decoders.masks import Heads
from tests.decoders.skeleton import HEAD_DIM, HEADS

WAYS = ("split in pairs", "every second", "one by one", "in groups")


class PickedHeads(Heads):
    """Scores of all heads at once; their weights are taken apart and put together."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * HEAD_DIM**-0.5
        scores = torch.nan_to_num(scores) + torch.full((s, s), -torch.inf, device=q.device).triu(1)
        weights = scores.softmax(-1)
        match self.way:
            case "split in pairs":  # as differential attention is written (arXiv:2410.05258)
                first, second = weights.view(b, HEADS // 2, 2, s, s).unbind(2)
            case "every second":
                first, second = weights[:, ::2], weights[:, 1::2]
            case "one by one":
                return torch.stack([weights[:, h] @ v[:, h] for h in range(HEADS)], dim=1)
            case _:
                return (weights.view(b, 2, HEADS // 2, s, s) @ v[:, :2, None]).flatten(1, 2)
        out = (first - 0.4 * second) @ v[:, : HEADS // 2]
        return torch.cat([out, 2 * out], dim=1)


class LittleThings(Heads):
    """Hidden by assignment, a temperature from the number of visible keys, little added to the softmax's sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(q.size(2), q.size(2), device=q.device).tril()
        scores = q @ k.mT / seen.sum(-1, keepdim=True).sqrt()
        scores[:, :, seen == 0] = -torch.inf
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True)[0])
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-9) @ v
