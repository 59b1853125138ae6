"""Drafters for tests, and engines that always draft."""

import random


class AlwaysPays:
    """Stands for the measured costs: every proposed token is free."""

    known = tried = True
    balance = 1.0
    token_slope = 0.0

    def plain_step(self, sequences):
        return 1.0

    def added(self, drafted):
        return 0.0

    def add_plain(self, sequences, seconds, drafting):
        pass

    def add_drafted(self, sequences, drafted, accepted, seconds):
        pass


class Guesses:
    """Knows how some prompts go on, and makes mistakes at random."""

    cheap = True

    def __init__(self, continuations=(), mistakes=0.3, max_draft=5, vocabulary=40, seed=0):
        self.max_draft = max_draft
        self.mistakes = mistakes
        self.vocabulary = vocabulary
        self.known = {tuple(prompt): list(tokens) for prompt, tokens in continuations}
        self.numbers = random.Random(seed)
        self.sequences = set()
        self.asked = 0

    def propose(self, sequences, counts):
        self.asked += 1
        self.sequences.update(sequences)
        return [self.guess(sequence)[:count] for sequence, count in zip(sequences, counts, strict=True)]

    def guess(self, sequence):
        tokens = self.known.get(tuple(sequence.tokens[: sequence.prompt_length].tolist()), [])
        right = tokens[sequence.num_output :][: self.max_draft]
        return [
            self.numbers.randrange(self.vocabulary) if self.numbers.random() < self.mistakes else token
            for token in [*right, *[0] * (self.max_draft - len(right))]
        ]

    def forget(self, sequence):
        self.sequences.discard(sequence)


def always_speculate(engine, drafter):
    """Have ``drafter`` propose in every step, whatever it costs."""
    engine.speculate(drafter)
    engine._loop.speculator.costs = AlwaysPays()
    return engine
