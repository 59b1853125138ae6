"""Log-probabilities of chosen and of likeliest tokens, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import TokenLogprobs


def record_logprobs(logits: Tensor, sequences: Ordered[Sequence], tokens: Ordered[int | None]) -> None:
    """Put the log-probabilities of each chosen token, and of the likeliest, into its sequence.

    They stand at the token's place in the output, so that a step which is computed again overwrites them.

    Args:
        logits: ``[R, V]``, as the model gave them.
        sequences: R sequences whose sampling has ``logprobs``.
        tokens: what was chosen for each; nothing is recorded for None.
    """
    logged = torch.log_softmax(logits.float(), dim=-1)
    # By width, because which of several equal ones topk takes may depend on how many are asked for.
    widths = {min(sequence.sampling.logprobs or 0, logged.shape[-1]) for sequence in sequences}
    tops = {width: [part.tolist() for part in logged.topk(width)] for width in widths}
    for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        if token is None:
            continue
        values, ids = tops[min(sequence.sampling.logprobs or 0, logged.shape[-1])]
        del sequence.logprobs[sequence.num_output :]
        top = tuple(zip(ids[row], values[row], strict=True))
        sequence.logprobs.append(TokenLogprobs(token, float(logged[row, token]), top))
