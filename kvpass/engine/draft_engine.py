"""Drafts by a smaller model: another engine with the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import replace

from kvpass.engine.engine import Engine
from kvpass.errors import ConfigError
from kvpass.runtime.sequences.draft_tree import DraftTree, merge_paths
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.speculation.speculation import Draft


class DraftEngine:
    """A drafter that has another engine continue the sequences, with the same options and seeds.

    Both engines then choose the token at one place with one random number, so that they agree often where their models
    do. The smaller engine keeps the prefixes of what it has drafted for, so it computes little twice; its pool should
    hold as many tokens as the other's.

    With ``branches``, the likeliest other first tokens are continued as well, in one batch, and proposed as a tree.

    Attributes:
        engine: the smaller engine. It may serve requests of its own meanwhile.
        max_draft: most tokens that are proposed at once, in each continuation.
        branches: most continuations that are proposed at once.
    """

    cheap = False

    def __init__(self, engine: Engine, max_draft: int = 6, branches: int = 1) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"a draft engine is made of a kvpass.Engine, not of a {type(engine).__name__}")
        for name, value in (("max_draft", max_draft), ("branches", branches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number of at least 1")
        self.engine = engine
        self.max_draft = max_draft
        self.branches = branches

    def check_for(self, engine: Engine) -> None:
        """Raise :class:`ConfigError` if this cannot draft for ``engine``."""
        if self.engine.plan.vocab_size != engine.plan.vocab_size:
            raise ConfigError(
                f"the draft engine has a vocabulary of {self.engine.plan.vocab_size} tokens, the engine that it drafts "
                f"for one of {engine.plan.vocab_size}: they must have the same tokenizer"
            )
        drafter: object = self
        while isinstance(drafter, DraftEngine):
            if drafter.engine is engine:
                raise ConfigError("an engine cannot draft for itself: give a smaller one")
            drafter = drafter.engine.drafter

    def propose(self, sequences: Ordered[Sequence], counts: Ordered[int]) -> list[Draft]:
        """What the smaller engine continues each sequence with; nothing where it cannot."""
        drafts: list[Draft] = [[] for _ in sequences]
        possible = [
            place
            for place, (sequence, count) in enumerate(zip(sequences, counts, strict=True))
            if count and self._can_continue(sequence, count)
        ]
        chosen = [(sequences[place], counts[place]) for place in possible]
        found: Ordered[Draft] = self._chains(chosen) if self.branches == 1 else self._trees(chosen)
        for place, draft in zip(possible, found, strict=True):
            drafts[place] = draft
        return drafts

    def _chains(self, chosen: list[tuple[Sequence, int]]) -> list[list[int]]:
        return self.engine.continue_sequences([_copy(sequence, count) for sequence, count in chosen])

    def _trees(self, chosen: list[tuple[Sequence, int]]) -> list[DraftTree]:
        """The token that the smaller engine chooses, then the likeliest others; each continued."""
        firsts = [_copy(sequence, 1, likeliest=self.branches) for sequence, _ in chosen]
        self.engine.continue_sequences(firsts)
        begun: list[tuple[int, int]] = []
        copies: list[Sequence] = []
        for place, ((sequence, count), first) in enumerate(zip(chosen, firsts, strict=True)):
            for token in _first_tokens(first, self.branches):
                begun.append((place, token))
                copies.append(_copy(sequence, count, token))
        paths: list[list[list[int]]] = [[] for _ in chosen]
        going_on = [copy for copy in copies if copy.num_output < copy.max_new_tokens]
        continued = dict(zip(going_on, self.engine.continue_sequences(going_on), strict=True))
        for (place, token), copy in zip(begun, copies, strict=True):
            paths[place].append([token, *continued.get(copy, [])])
        return [merge_paths(found) for found in paths]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept by sequence."""

    def _can_continue(self, sequence: Sequence, count: int) -> bool:
        plan = self.engine.plan
        length = sequence.num_tokens + count
        if plan.max_length is not None and length > plan.max_length:
            return False
        if not self.engine.has_room_for(length):
            return False
        return not any((sequence.tokens == token).any() for token in plan.forbidden_tokens)


def _copy(sequence: Sequence, count: int, first: int | None = None, likeliest: int | None = None) -> Sequence:
    """The same sequence, to be continued by ``count`` tokens.

    Args:
        sequence: what to continue.
        count: most new tokens.
        first: the first of them; None if it is to be chosen.
        likeliest: how many likeliest tokens to note at each place; None for none.
    """
    prompt: list[int] = sequence.tokens[: sequence.prompt_length].tolist()
    sampling = sequence.sampling if likeliest is None else replace(sequence.sampling, logprobs=likeliest)
    copy = Sequence(prompt, sequence.num_output + count, sampling, sequence.seed)
    for token in [*sequence.output, *([] if first is None else [first])]:
        copy.append(token)
    return copy


def _first_tokens(continued: Sequence, count: int) -> list[int]:
    """The token that a sequence was continued with, and the likeliest others at its place: at most ``count``."""
    if not continued.logprobs:
        return []
    chosen = continued.logprobs[-1]
    others = [token for token, _ in chosen.top if token != chosen.token]
    return [chosen.token, *others[: count - 1]]
