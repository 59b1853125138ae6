"""Drafts by a smaller model: another engine with the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from kvpass.engine import Engine
from kvpass.errors import ConfigError
from kvpass.runtime.sequence import Sequence


class DraftEngine:
    """A drafter that has another engine continue the sequences, with the same options and seeds.

    Both engines then choose the token at one place with one random number, so that they agree often where their models
    do. The smaller engine keeps the prefixes of what it has drafted for, so it computes little twice; its pool should
    hold as many tokens as the other's.

    Attributes:
        engine: the smaller engine. It may serve requests of its own meanwhile.
        max_draft: most tokens that are proposed at once.
    """

    cheap = False

    def __init__(self, engine: Engine, max_draft: int = 6) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"a draft engine is made of a kvpass.Engine, not of a {type(engine).__name__}")
        if isinstance(max_draft, bool) or not isinstance(max_draft, int) or max_draft < 1:
            raise ConfigError(f"max_draft={max_draft!r} is not a whole number of at least 1")
        self.engine = engine
        self.max_draft = max_draft

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

    def propose(self, sequences: Ordered[Sequence], counts: Ordered[int]) -> list[list[int]]:
        """What the smaller engine continues each sequence with; nothing where it cannot."""
        drafts: list[list[int]] = [[] for _ in sequences]
        places, copies = [], []
        for place, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            if count and self._can_continue(sequence, count):
                places.append(place)
                copies.append(_copy(sequence, count))
        for place, new in zip(places, self.engine.continue_sequences(copies), strict=True):
            drafts[place] = new
        return drafts

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


def _copy(sequence: Sequence, count: int) -> Sequence:
    """The same sequence, to be continued by ``count`` tokens."""
    prompt: list[int] = sequence.tokens[: sequence.prompt_length].tolist()
    copy = Sequence(prompt, sequence.num_output + count, sequence.sampling, sequence.seed)
    for token in sequence.output:
        copy.append(token)
    return copy
