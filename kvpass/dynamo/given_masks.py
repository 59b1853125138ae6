"""Causal masks that a caller spells out and hands over with the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CausalMask:
    """One number where a token is seen, another where it is not; ``[..., S, S]``, queries first.

    Attributes:
        dtype: of the mask.
        batched: of each dim before the last two, whether it is as large as the batch; else it is 1.
        seen: the number of what a token sees: itself, and what comes before it.
        hidden: the number of what it does not.
    """

    dtype: torch.dtype
    batched: tuple[bool, ...]
    seen: float
    hidden: float

    def build(self, batch: int, length: int, device: torch.device) -> Tensor:
        """The mask for another batch size and length."""
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if self.dtype is torch.bool:
            mask = seen if self.seen else ~seen
        else:
            mask = torch.where(seen, self.seen, self.hidden).to(self.dtype)
        sizes = [batch if batched else 1 for batched in self.batched]
        return mask.expand(*sizes, length, length)


def read_causal(mask: Tensor, batch: int, length: int, known: CausalMask | None = None) -> CausalMask | None:
    """The causal mask that a tensor is, entry by entry; None if it is none.

    Args:
        mask: as it was given.
        batch: sequences of the call.
        length: tokens of each.
        known: what the call before was given: a single token does not tell what hides others.
    """
    if mask.dim() < 2 or mask.shape[-2:] != (length, length) or any(size not in (1, batch) for size in mask.shape[:-2]):
        return None
    if length == 1:
        found = known
    else:
        corner = mask.reshape(-1, length, length)[0, 0, :2].tolist()
        batched = tuple(size == batch and batch > 1 for size in mask.shape[:-2])
        found = CausalMask(mask.dtype, batched, float(corner[0]), float(corner[1]))
    if found is None or found.dtype is not mask.dtype or len(found.batched) != mask.dim() - 2:
        return None
    if found.seen == found.hidden:
        return None
    return found if torch.equal(mask, found.build(batch, length, mask.device).expand_as(mask)) else None
