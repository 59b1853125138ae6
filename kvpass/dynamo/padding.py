"""Whether a model gives a padded row the logits of the row alone: tried on texts longer than code is written around."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.outputs import Path, logits_at

Sides = tuple[bool, bool]  # whether there is padding before a text, and behind it
LONG = 2049  # tokens
PADS = (1, 5, 700)
REASON = (
    "it gives a padded row other logits than the same row alone: it counts padding as positions, or does not look at "
    "the mask. Pass position_ids that count the tokens, or rows of one length"
)


@torch.no_grad()
def check_padding(
    model: nn.Module, path: Path, call: ModelCall, sides: Sides, longest: int, vocab_size: int, bound: float
) -> None:
    """Compare padded texts with themselves, every token of each.

    Args:
        model: the user's.
        path: of the logits in what it returns.
        call: of a scope, with a mask of padding; says what masks and positions are.
        sides: where the padding is.
        longest: tokens that a text may have.
        vocab_size: number of token ids.
        bound: how far apart logits may be, relative to the largest.

    Raises:
        LeftAlone: if a token has other logits.
    """
    length = min(LONG, longest)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(vocab_size, (2, length), generator=generator).to(call.ids.device)
    before, behind = sides
    for pad in (pad for pad in PADS if 2 * pad < length):
        here = slice(pad if before else 0, length - pad if behind else length)
        mask = torch.ones_like(drawn)
        mask[0] = 0
        mask[0, here] = 1
        wanted = _logits(model, path, call, drawn[:1, here], torch.ones_like(drawn[:1, here]))
        found = _logits(model, path, call, drawn, mask)[:1]
        if found.shape[1] == length:  # else it gives the last token's alone
            found = found[:, here]
        apart = (found.float() - wanted.float()).abs().max()
        if not bool(apart <= bound * wanted.float().abs().max()):
            raise LeftAlone(REASON, lasting=False)


def _logits(model: nn.Module, path: Path, call: ModelCall, ids: Tensor, mask: Tensor) -> Tensor:
    """``[B, S, V]``, or ``[B, 1, V]``, as the model gives them for a padded batch."""
    arguments = call.for_tokens(ids, (mask.cumsum(1) - 1).clamp(min=0))
    assert call.mask is not None
    arguments[call.mask] = mask.to(arguments[call.mask].dtype)
    args, kwargs = call.bound(arguments)
    logits = logits_at(model._call_impl(*args, **kwargs), path)
    return logits.reshape(len(ids), -1, logits.shape[-1])
