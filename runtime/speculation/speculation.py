"""Speculative decoding: how many tokens are proposed for which sequence, and whether it pays.

A drafter proposes tokens, the model computes them in the same step as the newest token, and those that are right are
kept (:mod:`kvpass.runtime.speculation.verification`). A proposed token is worth trying while the time that an accepted
token saves, times the chance that it is accepted with all before it, exceeds the time that it adds to the step. All
three are
measured: the chance for each sequence, the times on the engine's own steps. Where that never holds nothing is proposed,
but for a trial now and then; and what trials may lose is bounded
(:class:`kvpass.runtime.speculation.draft_costs.DraftCosts`).
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

from kvpass.errors import InputError
from kvpass.runtime.sequences.draft_tree import DraftTree, chain
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step
from kvpass.runtime.speculation.draft_costs import DraftCosts
from kvpass.runtime.speculation.verification import can_be_drafted

# Steps of a sequence without drafts after which an expensive drafter is tried again, and of all without a plain step.
_TRY_EVERY = 64
_PLAIN_EVERY = 64
# Tokens of such a trial, and of the first drafts of all.
_TRIAL = 1
# Tokens that stand for what is known of other sequences, when the chances of a new one are estimated.
_PRIOR_TOKENS = 4.0
_MEMORY = 0.9


# Tokens one after the other, or a tree of them.
Draft = list[int] | DraftTree


class Drafter(Protocol):
    """Proposes tokens that may follow a sequence. Wrong ones cost time and never change the output.

    One that proposes several continuations of a sequence has an attribute ``branches`` besides, how many at most; each
    path of its trees counts.

    Attributes:
        cheap: proposing takes next to no time, so that it can be watched while nothing is drafted.
        max_draft: most tokens worth asking for at once, in one continuation.
    """

    cheap: bool
    max_draft: int

    def propose(self, sequences: Ordered[Sequence], counts: Ordered[int], /) -> Ordered[Draft]:
        """For each sequence at most so many tokens, or none; a sequence has its ``tokens`` so far, and ``sampling``.

        In a tree, it is the tokens of each path that there are at most so many of. It is called while a step is
        computed, so it must not wait for the engine that it drafts for.
        """

    def forget(self, sequence: Sequence, /) -> None:
        """Drop what is known of a sequence that has ended; it may never have been proposed anything for."""


@dataclass
class Chance:
    """How often proposed tokens of one sequence, or of all, were right.

    Attributes:
        right: proposed tokens that were right, fading.
        tried: proposed tokens that were compared, fading; those after a wrong one are not.
        idle: steps since something was proposed.
    """

    right: float = 0.0
    tried: float = 0.0
    idle: int = 0

    def add(self, right: int, tried: int) -> None:
        """``tried`` tokens were compared, and ``right`` of them were right."""
        self.right = self.right * _MEMORY + right
        self.tried = self.tried * _MEMORY + tried


class Speculator:
    """Has a drafter propose tokens for running sequences, and learns from what becomes of them.

    Attributes:
        drafter: whom to ask.
        branches: most continuations that it proposes for a sequence.
        costs: what it costs and gains.
    """

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.drafter = drafter
        self.branches: int = getattr(drafter, "branches", 1)
        self.costs = DraftCosts()
        self._vocab_size = vocab_size
        self._chances: dict[Sequence, Chance] = {}
        self._all = Chance(right=3.0, tried=4.0)
        # First proposed tokens of sequences for which nothing is computed, to see whether they would have been right.
        self._watched: dict[Sequence, int] = {}
        # Tokens that a proposal has for each one of its longest path, fading.
        self._width = 1.0
        self._since_plain = 0
        self._since_drafted = 0

    def propose(self, sequences: Ordered[Sequence]) -> None:
        """Propose tokens for those of ``sequences`` for which it promises to pay; they decode, one token each."""
        self._watched = {}
        if not sequences or not self.costs.known or self.costs.balance < 0:
            return
        candidates = [sequence for sequence in sequences if can_be_drafted(sequence)]
        counts = self._counts(candidates, len(sequences))
        if not self.drafter.cheap and not any(counts):
            return
        asked = [max(count, int(self.drafter.cheap)) for count in counts]
        drafts = self._checked(self.drafter.propose(candidates, asked), asked)
        if self._is_trial:
            # The first nodes are the likeliest path, and what drafts cost shows on few as well.
            drafts = [draft.cut(count) for draft, count in zip(drafts, counts, strict=True)]
        elif self.drafter.cheap and not self._pays(candidates, drafts, counts, len(sequences)):
            counts = [0] * len(counts)
        for sequence, draft, count in zip(candidates, drafts, counts, strict=True):
            if draft.tokens and count == 0:
                self._watched[sequence] = draft.tokens[0]
            sequence.propose(draft.tokens if count else [], None if draft.is_chain else draft.parents)

    def learn(self, step: Step, tokens: Ordered[Ordered[int] | None], drafting: float, seconds: float) -> None:
        """Take note of the ``tokens`` that a step has given, before they are committed.

        Args:
            step: what was computed.
            tokens: new tokens of each of its sampled sequences.
            drafting: seconds that :meth:`propose` took.
            seconds: time of the whole step, this included.
        """
        accepted = 0
        for sequence, drafted, new in zip(step.sampled, step.drafted, tokens, strict=True):
            chance = self._chances.get(sequence)
            if new is None or chance is None:
                continue
            chance.idle = 0 if drafted else chance.idle + 1
            if drafted:
                accepted += len(new) - 1
                # What is chosen behind a leaf was compared with nothing.
                tree, right = sequence.draft_tree(drafted), len(new) - 1
                path = tree.follow(new[:-1])
                self._note(chance, right, right + ((path[-1] if path else -1) in tree.parents))
            elif sequence in self._watched:
                self._note(chance, int(new[0] == self._watched[sequence]), 1)
        computed = sum(end - start for _, start, end in step.ranges)
        if len(step.sampled) == len(step.ranges) and computed == len(step.ranges) + sum(step.drafted):
            if any(step.drafted):
                self._since_plain += 1
                self._since_drafted = 0
                self.costs.add_drafted(len(step.ranges), sum(step.drafted), accepted, seconds)
            else:
                self._since_plain = 0
                self._since_drafted += 1
                self.costs.add_plain(len(step.ranges), seconds, drafting)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if self._chances.pop(sequence, None) is not None:
            self._watched.pop(sequence, None)
            self.drafter.forget(sequence)

    @property
    def _is_trial(self) -> bool:
        """Whether to find out, against the odds, what drafts cost now; what they are worth is watched all the while."""
        return not self.costs.tried or (self.drafter.cheap and self._since_drafted >= _TRY_EVERY)

    def _counts(self, candidates: list[Sequence], running: int) -> list[int]:
        """How many tokens to ask for, for each candidate."""
        if self._since_plain >= _PLAIN_EVERY:
            return [0] * len(candidates)
        worth = self.costs.plain_step(running) / running
        chances = [self._chances.setdefault(sequence, Chance()) for sequence in candidates]
        if self._is_trial:
            return [min(_TRIAL, self.drafter.max_draft)] * len(candidates)
        return [self._count(chance, worth, self.costs.token_slope) for chance in chances]

    def _count(self, chance: Chance, worth: float, price: float) -> int:
        right = self._estimate(chance)
        count, likely = 0, right
        while count < self.drafter.max_draft and likely * worth > price * self._width:
            count += 1
            likely *= right
        # What an expensive drafter proposes is not watched, so that its chances show in trials alone.
        if count == 0 and chance.idle >= _TRY_EVERY and not self.drafter.cheap:
            return min(_TRIAL, self.drafter.max_draft)
        return count

    def _pays(self, candidates: list[Sequence], drafts: list[DraftTree], counts: list[int], running: int) -> bool:
        """Whether what is hoped for outweighs what the drafts together add to the step."""
        drafted = [(sequence, draft) for sequence, draft, n in zip(candidates, drafts, counts, strict=True) if n]
        hoped = sum(
            _expected(self._estimate(self._chances[sequence]), max(draft.depths(), default=0))
            for sequence, draft in drafted
        )
        added = self.costs.added(sum(len(draft.tokens) for _, draft in drafted))
        return hoped * self.costs.plain_step(running) / running > added

    def _estimate(self, chance: Chance) -> float:
        before = self._all.right / self._all.tried
        return (chance.right + _PRIOR_TOKENS * before) / (chance.tried + _PRIOR_TOKENS)

    def _note(self, chance: Chance, right: int, tried: int) -> None:
        chance.add(right, tried)
        self._all.add(right, tried)

    def _checked(self, drafts: Ordered[Draft], asked: list[int]) -> list[DraftTree]:
        trees = []
        for draft, count in zip(drafts, asked, strict=True):
            tree = draft if isinstance(draft, DraftTree) else chain(draft)
            known = all(type(token) is int and 0 <= token < self._vocab_size for token in tree.tokens)
            leaves = len(set(range(len(tree.tokens))) - set(tree.parents))
            if not (known and tree.is_valid and max(tree.depths(), default=0) <= count and leaves <= self.branches):
                raise InputError(
                    f"the drafter proposed {draft!r} where {count} tokens were asked for: token ids are whole numbers "
                    f"from 0 to {self._vocab_size - 1}, no path has more than asked for, and there are no more paths "
                    f"than its branches, which are {self.branches}"
                )
            trees.append(tree)
            if tree.tokens:
                self._width += (1 - _MEMORY) * (len(tree.tokens) / max(tree.depths()) - self._width)
        return trees


def _expected(right: float, count: int) -> float:
    """Tokens of ``count`` proposed ones that are accepted on average."""
    return count * right if right >= 1 else right * (1 - right**count) / (1 - right)
