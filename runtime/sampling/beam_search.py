"""Beam search: the likeliest outputs of a prompt, as far as a few of the likeliest beginnings lead to them.

The rules are those of ``generate(num_beams=...)`` in transformers 5, so that outputs can be compared with it: of the
``2 B`` likeliest continuations of all beams (``(1 + e) B`` with e end-of-sequence tokens) those that do not end go on
as the next B beams, and those of the first B that do end are kept, by their score. A score is the log-probability of
the output over ``length ** length_penalty`` (divided by a power of the length as in Wu et al., arXiv 1609.08144,
without the constants there).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpass.errors import InputError, IntegrityError
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import CachePlan

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Beam:
    """One output of a beam search.

    Attributes:
        tokens: its new tokens, with the end-of-sequence token if there is one.
        score: its log-probability over ``len(tokens) ** length_penalty``.
    """

    tokens: list[int]
    score: float


class Choice(NamedTuple):
    """How one of the next beams goes on: the place of the beam that it continues, its token, its log-probability."""

    parent: int
    token: int
    logprob: float


class BeamSearch:
    """The state of one search. It knows sequences by their tokens alone; what they hold is the scheduler's.

    Attributes:
        sequences: the beams, the likeliest first.
        found: outputs that have ended, the best first; no more than there are beams.
        is_done: no beam is looked at any more.
        is_changing: the beams change hands: if an exception leaves it so, the search cannot go on.
    """

    def __init__(
        self,
        root: Sequence,
        num_beams: int,
        length_penalty: float,
        early_stopping: EarlyStopping,
        eos_token_ids: Collection[int],
    ) -> None:
        self.sequences = [root]
        self.found: list[Beam] = []
        self.is_done = False
        self.is_changing = False
        self._logprobs = [0.0]
        self._num_beams = num_beams
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._ends = frozenset(eos_token_ids)
        self._most_new = root.max_new_tokens
        # Of each beam that was computed the likeliest continuations: log-probabilities and tokens.
        self._computed: dict[Sequence, tuple[Tensor, Tensor]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether all beams are computed, so that the next ones can be chosen."""
        return not self.is_done and all(sequence in self._computed for sequence in self.sequences)

    def note(self, sequences: Ordered[Sequence], logits: Tensor) -> None:
        """Take note of the logits ``[R, V]`` that follow some of the beams."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, tokens = logprobs.topk(count_continuations(self._num_beams, len(self._ends)), dim=-1)
        for row, sequence in enumerate(sequences):
            self._computed[sequence] = values[row].cpu(), tokens[row].cpu()

    def note_scored(self, sequence: Sequence, first: int, logits: Tensor) -> None:
        """Never called: beams ask for the logits of their newest tokens alone."""
        raise IntegrityError("a beam search was given logits that it had not asked for")

    def choose(self) -> list[Choice]:
        """The next beams, the likeliest first; none if the search is done. Outputs that end now are in ``found``."""
        length = self.sequences[0].num_output + 1
        continuations = self._continuations()
        ended = [length >= self._most_new or choice.token in self._ends for choice in continuations]
        found = self.found + [
            Beam([*self.sequences[choice.parent].output, choice.token], choice.logprob / length**self._length_penalty)
            for choice, ends in zip(continuations[: self._num_beams], ended, strict=False)
            if ends
        ]
        found = sorted(found, key=lambda beam: -beam.score)[: self._num_beams]
        going_on = [choice for choice, ends in zip(continuations, ended, strict=True) if not ends][: self._num_beams]
        is_full = len(found) == self._num_beams
        self.is_done = not going_on or (is_full and not self._may_improve(found, going_on, length))
        self.found = found
        return [] if self.is_done else going_on

    def replace(self, sequences: list[Sequence], choices: Ordered[Choice]) -> None:
        """Go on with ``sequences``, which have the tokens of ``choices``."""
        self.sequences = sequences
        self._logprobs = [choice.logprob for choice in choices]
        self._computed = {}

    def _continuations(self) -> list[Choice]:
        """The likeliest continuations of all beams together, the likeliest first."""
        rows = [self._computed[sequence] for sequence in self.sequences]
        whole = torch.stack([values for values, _ in rows]) + torch.tensor(self._logprobs, dtype=torch.float32)[:, None]
        width = whole.shape[1]
        logprobs, places = whole.flatten().topk(width)
        tokens = torch.stack([tokens for _, tokens in rows]).flatten()[places]
        parents = (places // width).tolist()
        return list(map(Choice, parents, tokens.tolist(), logprobs.tolist()))

    def _may_improve(self, found: list[Beam], going_on: list[Choice], length: int) -> bool:
        """Whether a beam that goes on might still be better than the worst of as many outputs as there are beams."""
        if self._early_stopping is True:
            return False
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._most_new
        best: float = going_on[0].logprob / length**self._length_penalty
        return best > found[-1].score


def make_search(
    root: Sequence,
    plan: CachePlan,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    eos_token_ids: Collection[int],
) -> BeamSearch:
    """A search that begins with ``root``, a new sequence without a token that ends it.

    Raises:
        InputError: if one of the options cannot be used.
    """
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise InputError(f"beams={num_beams!r} is not a whole number of at least 1")
    number = isinstance(length_penalty, int | float) and not isinstance(length_penalty, bool)
    if not number or not math.isfinite(length_penalty):
        raise InputError(f"length_penalty={length_penalty!r} is not a number: 0 for none, more to favour long outputs")
    if early_stopping not in (True, False, "never") or not isinstance(early_stopping, bool | str):
        raise InputError(f"early_stopping={early_stopping!r} is none of True, False and 'never'")
    if not isinstance(eos_token_ids, list | tuple | set | frozenset) or not all(
        type(token) is int and 0 <= token < plan.vocab_size for token in eos_token_ids
    ):
        raise InputError(
            f"eos_token_ids={eos_token_ids!r} is no list of token ids of this model: ids are 0 to {plan.vocab_size - 1}"
        )
    needed = count_continuations(num_beams, len(set(eos_token_ids)))
    if needed > plan.vocab_size:
        raise InputError(
            f"beams={num_beams} with {len(set(eos_token_ids))} tokens that end an output look at {needed} tokens after "
            f"the prompt, and the model has {plan.vocab_size}: ask for fewer beams"
        )
    return BeamSearch(root, num_beams, length_penalty, early_stopping, eos_token_ids)


def count_continuations(num_beams: int, num_ends: int) -> int:
    """Continuations that are looked at, so that enough are left for the next beams if some of them end."""
    return max(2, 1 + num_ends) * num_beams
