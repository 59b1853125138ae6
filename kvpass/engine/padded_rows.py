"""Which tokens of a padded batch are there, and whether positions that come with them count these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.errors import InputError


def present_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Bool ``[B, S]``: which of the token ids ``[B, S]`` are no padding.

    Args:
        ids: token ids.
        mask: ones, and zeros at padding, ``[B, S]`` or ``[1, S]``; None where nothing is padded.

    Raises:
        InputError: if the mask is of another shape, or holds anything else.
    """
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape not in (ids.shape, (1, ids.shape[1])):
        raise InputError(
            f"the mask has shape {list(mask.shape)}, and the ids {list(ids.shape)}: a mask of ones and zeros for each "
            "token is understood, no other"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("the mask holds more than ones and zeros: a mask of padding is understood, no other")
    return (mask != 0).expand_as(ids)


def check_positions(positions: Tensor, present: Tensor, before: Sequence[int] | None = None) -> None:
    """Refuse positions that do not count the tokens that are there.

    Args:
        positions: ``[B, S]`` or ``[1, S]``.
        present: which tokens are there, ``[B, S]``.
        before: tokens that each row goes on from; None for none.

    Raises:
        InputError: if they do not.
    """
    counted = present.cumsum(-1) - 1
    if before is not None:
        counted = counted + torch.tensor(before, device=counted.device)[:, None]
    if not bool(((positions.expand_as(counted) == counted) | ~present).all()):
        raise InputError("position_ids do not count the tokens of each row from 0: leave them out, or count so")
