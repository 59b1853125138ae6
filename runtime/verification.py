"""Which of the proposed tokens are right: the tokens of a step in which some sequences were drafted.

Each token is chosen from the model's own logits by the request's options, with the random number that belongs to its
place in the output, whether a proposal was computed for it or not. A proposed token is right if it is the one that is
chosen, and what follows the first wrong one was computed for another history and is dropped. So the output is that of
plain decoding, token by token, for greedy requests and for seeded ones; and a token proposed with no regard to chance
is accepted with exactly the probability that the model gives it, as in speculative sampling (Leviathan et al., arXiv
2211.17192; Chen et al., arXiv 2302.01318). Drafters that share the random numbers with the model they draft for agree
with it more often than those that draw their own (Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvpass.runtime.sampling import choose_plain, is_plain, sample
from kvpass.runtime.sequence import Sequence
from kvpass.runtime.step import Step


def can_be_drafted(sequence: Sequence) -> bool:
    """Whether several tokens of a sequence can be chosen at once: its options must not look at the tokens before."""
    return is_plain(sequence.sampling) and sequence.sampling.logprobs is None


def choose_tokens(logits: Tensor, step: Step) -> list[list[int] | None]:
    """The new tokens of each of ``step.sampled``, at least one; None where none can be chosen.

    Args:
        logits: ``[R, V]``; for each sampled sequence the row of its newest token, then those of its proposed ones.
    """
    if not any(step.drafted):
        return [None if token is None else [token] for token in sample(logits, step.sampled)]
    rows = np.cumsum([0, *(count + 1 for count in step.drafted)]).tolist()
    first_tokens = sample(logits[rows[:-1]], step.sampled)
    ahead = [
        (first + i, sequence, sequence.num_output + i)
        for first, sequence, count in zip(rows, step.sampled, step.drafted, strict=False)
        for i in range(1, count + 1)
    ]
    later = iter(
        choose_plain(
            logits[[row for row, _, _ in ahead]],
            [sequence.sampling for _, sequence, _ in ahead],
            [sequence.seed for _, sequence, _ in ahead],
            [counter for _, _, counter in ahead],
        )
    )
    chosen: list[list[int] | None] = []
    for sequence, count, token in zip(step.sampled, step.drafted, first_tokens, strict=True):
        following = [next(later) for _ in range(count)]
        chosen.append(None if token is None else _accept(sequence.draft[:count], token, following))
    return chosen


def _accept(draft: list[int], token: int, following: list[int | None]) -> list[int]:
    """The tokens chosen up to the first that is not the proposed one; nothing is taken of logits that give none."""
    tokens = [token]
    for proposed, after in zip(draft, following, strict=True):
        if tokens[-1] != proposed or after is None:
            break
        tokens.append(after)
    return tokens
