"""Prefix-LMs: the first tokens see one another, whatever is asked of them later is causal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.decoders.heads import Grouped
from tests.decoders.skeleton import HEADS


class Prefix(Grouped):
    """A prefix of five or eleven tokens in several spellings; `half` makes it half of the sequence."""

    def __init__(self, spelling: str = "compared") -> None:
        super().__init__(kv_heads=HEADS // 2)
        self.spelling = spelling
        buffer = torch.ones(96, 96, dtype=torch.bool).tril()
        buffer[:5, :5] = True
        self.register_buffer("visible", buffer, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.size(2)
        i = torch.arange(length, device=q.device)
        mask = (i[None, :] <= i[:, None]) | (i[None, :] < (length // 2 if self.spelling == "half" else 5))
        if self.spelling == "a buffer":
            mask = self.visible[:length, :length]
        elif self.spelling == "added, of eleven":
            mask = torch.full((length, length), torch.finfo(q.dtype).min, device=q.device).triu(1)
            mask = mask.masked_fill(i < 11, 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
