"""Drafters for tests, and engines that always draft."""

import random

import kvpass
from kvpass.runtime.sequences.draft_tree import merge_paths
from tests.history_engine import check_idle, make_engine, ragged


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


def counts_of_a_twins_drafts(temperature, options, branches=1):
    """What was drafted and accepted where another engine of the same model drafts; the tokens are those of none."""
    prompts = ragged(8)
    samplings = [kvpass.Sampling(temperature=temperature, seed=index) for index in range(8)]
    expected = make_engine().generate(prompts, 15, samplings)
    small = make_engine()
    engine = always_speculate(make_engine(**options), kvpass.DraftEngine(small, max_draft=4, branches=branches))
    assert engine.generate(prompts, 15, samplings) == expected
    check_idle(engine)
    check_idle(small)
    assert small.stats().prefix_hit_tokens > 0
    return engine._scheduler.counts


class Branching(Guesses):
    """Knows how some prompts go on, and proposes that among other ways, in a tree and in any order."""

    branches = 3

    def guess(self, sequence):
        paths = [super(Branching, self).guess(sequence) for _ in range(self.branches)]
        # Of the longest path any part may be right; one that is right is rarely the first.
        paths[0] = [(token + 1) % self.vocabulary if i == 2 else token for i, token in enumerate(paths[0])]
        return paths

    def propose(self, sequences, counts):
        self.asked += 1
        self.sequences.update(sequences)
        pairs = zip(sequences, counts, strict=True)
        return [merge_paths(path[:count] for path in self.guess(sequence)) for sequence, count in pairs]
