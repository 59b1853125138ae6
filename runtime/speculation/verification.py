"""Which of the proposed tokens are right: the tokens of a step in which some sequences were drafted.

Each token is chosen from the model's own logits by the request's options, with the random number that belongs to its
place in the output, whether a proposal was computed for it or not. A proposed token is right if it is the one that is
chosen; what was computed for another history is dropped. So the output is that of plain decoding, token by token, for
greedy requests and for seeded ones. A token proposed with no regard to chance is accepted with exactly the probability
that the model gives it, as in speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318);
and one of several that are proposed for one place, in a tree, with the sum of theirs, which is what rejecting one
child after the other comes to (SpecInfer, arXiv 2305.09781) and the most that is possible. Drafters that share the
random numbers with the model they draft for agree with it more often than those that draw their own (Daliri et al.,
arXiv 2408.07978).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvpass.runtime.sampling.sampling import choose_plain, is_plain, sample
from kvpass.runtime.sequences.draft_tree import DraftTree
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step


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
    trees = [sequence.draft_tree(count) for sequence, count in zip(step.sampled, step.drafted, strict=True)]
    first_tokens = sample(logits[rows[:-1]], step.sampled)
    ahead = [
        (first + node, sequence, sequence.num_output + depth)
        for first, sequence, tree in zip(rows, step.sampled, trees, strict=False)
        for node, depth in enumerate(tree.depths(), start=1)
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
    for tree, token in zip(trees, first_tokens, strict=True):
        following = [next(later) for _ in tree.tokens]
        chosen.append(None if token is None else _accept(tree, token, following))
    return chosen


def _accept(tree: DraftTree, token: int, following: list[int | None]) -> list[int]:
    """The tokens chosen up to the first that is not proposed; nothing is taken of logits that give none.

    Args:
        tree: the proposed tokens.
        token: the one chosen after the sequence's newest one.
        following: of each node the token chosen after it.
    """
    children = {key: node for node, key in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    tokens, node = [token], -1
    while True:
        child = children.get((node, tokens[-1]))
        after = None if child is None else following[child]
        if child is None or after is None:
            return tokens
        tokens.append(after)
        node = child
