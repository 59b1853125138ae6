"""Attentions that take heads apart after the softmax, and small things that people write around one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class BesideTheCache(Heads):
    """A temperature learned per head, after the mask; and what needs no cache: attention to learned keys and values,
    which open up with the position, and of each token's heads to one another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros(2, HEADS, 5, HEAD_DIM))
        self.temperature = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.size(2)
        seen = torch.arange(5, device=q.device) <= torch.arange(s, device=q.device)[:, None] // 4
        keys, values = self.learned.unsqueeze(1).expand(-1, q.size(0), -1, -1, -1)
        learned = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        heads = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        scores = q @ k.mT * HEAD_DIM**-0.5 + torch.full((s, s), -torch.inf, device=q.device).triu(1)
        causal = (scores * self.temperature.exp()).softmax(-1) @ v
        causal[..., -1] = 0
        return causal + learned + heads
