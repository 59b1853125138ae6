"""Drafters, the choice among proposed tokens, and when it pays."""

import numpy as np
import pytest
import torch

from kvpass.errors import ConfigError
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step
from kvpass.runtime.speculation.draft_costs import DraftCosts, FadingLine
from kvpass.runtime.speculation.prompt_lookup import PromptLookup
from kvpass.runtime.speculation.verification import can_be_drafted, choose_tokens
from kvpass.types import Sampling


def sequence_of(tokens, new=100, sampling=None, seed=0):
    return Sequence(list(tokens), new, sampling or Sampling(), seed)


def step_of(*sequences):
    drafted = tuple(sequence.num_draft for sequence in sequences)
    ranges = tuple((s, s.num_tokens - 1, s.num_tokens + n) for s, n in zip(sequences, drafted, strict=True))
    return Step(ranges, sequences, drafted)


def slow_lookup(tokens, sizes, count):
    """By comparing every place: the newest earlier occurrence of the longest n-gram, copied on past the end."""
    for size in sorted(sizes, reverse=True):
        places = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[len(tokens) - size :]]
        if places and len(tokens) >= size:
            copied = list(tokens)
            for _ in range(count):
                copied.append(copied[places[-1] + len(copied) - len(tokens)])
            return copied[len(tokens) :]
    return []


def test_prompt_lookup_copies_what_followed_the_newest_occurrence():
    numbers = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        sizes = tuple(numbers.integers(1, 5, size=3).tolist())
        drafter = PromptLookup(sizes, max_draft=7)
        sequence = sequence_of(numbers.integers(0, 4, size=numbers.integers(1, 30)).tolist())
        for _ in range(12):
            count = int(numbers.integers(0, 10))
            (draft,) = drafter.propose([sequence], [count])
            assert draft == slow_lookup(sequence.tokens.tolist(), sizes, min(count, 7))
            found += bool(draft)
            for token in numbers.integers(0, 4, size=numbers.integers(1, 4)).tolist():
                sequence.append(token)
        drafter.forget(sequence)
        drafter.forget(sequence)
        assert not drafter._indexes
    assert found > 300


@pytest.mark.parametrize(
    "options", [{"ngram_sizes": ()}, {"ngram_sizes": (0,)}, {"ngram_sizes": 3}, {"max_draft": 0}, {"max_draft": 2.0}]
)
def test_a_prompt_lookup_that_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PromptLookup(**options)


def test_proposed_tokens_are_accepted_up_to_the_first_wrong_one():
    best = [[5, 6, 7, 1], [2, 9, 9], [3], [8, 4]]
    drafts = [[5, 6, 7], [3, 9], [], [8]]
    sequences = [sequence_of([1, 2]) for _ in drafts]
    for sequence, draft in zip(sequences, drafts, strict=True):
        sequence.propose(draft)
    logits = torch.nn.functional.one_hot(torch.tensor([token for row in best for token in row]), 10).float()
    assert choose_tokens(logits, step_of(*sequences)) == [[5, 6, 7, 1], [2], [3], [8, 4]]
    logits[1] = float("nan")
    logits[7] = float("nan")
    assert choose_tokens(logits, step_of(*sequences)) == [[5], [2], None, [8, 4]]


def test_equal_seeds_give_equal_tokens_with_any_drafts():
    torch.manual_seed(0)
    table = torch.randn(12, 12) * 2
    options = Sampling(temperature=1.0, top_k=8, top_p=0.95)

    def generate(propose):
        sequence = sequence_of([1, 2], 40, options, seed=11)
        while sequence.num_output < 40:
            sequence.propose(propose(sequence))
            computed = [int(sequence.tokens[-1]), *sequence.draft]
            (new,) = choose_tokens(table[computed], step_of(sequence))
            for token in new[: 40 - sequence.num_output]:
                sequence.append(token)
        return sequence.output

    plain = generate(lambda sequence: [])
    numbers = np.random.default_rng(0)
    assert generate(lambda sequence: numbers.integers(0, 12, size=5).tolist()) == plain
    assert generate(lambda sequence: plain[sequence.num_output :][:7]) == plain
    assert generate(lambda sequence: [*plain[sequence.num_output :][:2], 3, 3]) == plain


def chi_squared(counts, chances):
    """The statistic, and how many cells it has; those expected less than five times are put together."""
    expected = chances * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    used = wanted > 0
    return (((observed - wanted) ** 2)[used] / wanted[used]).sum(), int(used.sum())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("drafted", ["likeliest", "unlikely", "drawn"])
def test_the_distribution_of_sampled_tokens_is_that_of_plain_decoding(drafted):
    """Pairs of tokens from 20,000 seeds, against the chances computed by hand in float64."""
    draws, size = 20_000, 5
    table = torch.tensor(np.random.default_rng(5).normal(size=(size, size)) * 1.5, dtype=torch.float32)
    chances = torch.softmax(table.double() / 0.8, -1).numpy()
    options = Sampling(temperature=0.8)
    numbers = np.random.default_rng(9)
    sequences = [sequence_of([0], 3, options, seed) for seed in range(draws)]
    for sequence in sequences:
        if drafted == "likeliest":
            first = int(chances[0].argmax())
            sequence.propose([first, int(chances[first].argmax())])
        elif drafted == "unlikely":
            sequence.propose([int(chances[0].argmin()), 1])
        else:
            sequence.propose(numbers.integers(0, size, size=2).tolist())
    rows = torch.tensor([[0, *sequence.draft] for sequence in sequences]).flatten()
    new = choose_tokens(table[rows], step_of(*sequences))
    firsts = np.array([tokens[0] for tokens in new])
    statistic, cells = chi_squared(np.bincount(firsts, minlength=size), chances[0])
    # The 99.9 % points of chi-squared with 4 degrees of freedom; all five cells are likely enough to count.
    assert cells == size and statistic < 18.47
    for first in range(size):
        seconds = [tokens[1] for tokens in new if tokens[0] == first and len(tokens) > 1]
        if len(seconds) > 500:
            statistic, cells = chi_squared(np.bincount(seconds, minlength=size), chances[first])
            assert statistic < {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[max(1, cells - 1)]
    # A proposed token is accepted as often as the model would have chosen it.
    proposed = np.array([sequence.draft[0] for sequence in sequences])
    accepted = np.array([len(tokens) > 1 for tokens in new])
    for token in set(proposed.tolist()):
        tried = accepted[proposed == token]
        spread = (chances[0][token] * (1 - chances[0][token]) / len(tried)) ** 0.5
        assert abs(tried.mean() - chances[0][token]) < 4 * spread


def test_the_chi_squared_test_finds_a_wrong_acceptance_rule():
    """Accepting a proposed token half of the time, whatever its chance, is found out."""
    numbers = np.random.default_rng(3)
    chances = np.array([0.5, 0.3, 0.1, 0.05, 0.05])
    plain = numbers.choice(5, size=20_000, p=chances)
    assert chi_squared(np.bincount(plain, minlength=5), chances)[0] < 18.47
    forced = np.where(numbers.random(20_000) < 0.02, 2, plain)
    assert chi_squared(np.bincount(forced, minlength=5), chances)[0] > 18.47


def test_what_looks_at_the_tokens_before_is_not_drafted():
    assert can_be_drafted(sequence_of([1], sampling=Sampling(temperature=1, top_k=3, min_p=0.1)))
    for options in ({"repetition_penalty": 1.2}, {"logit_bias": {1: 1.0}}, {"logprobs": 2}):
        assert not can_be_drafted(sequence_of([1], sampling=Sampling(**options)))
    assert not can_be_drafted(sequence_of([1], sampling=Sampling(allowed_tokens=lambda output: [1])))


def test_a_fading_line_follows_measurements():
    line, numbers = FadingLine(), np.random.default_rng(0)
    for _ in range(200):
        x = float(numbers.integers(1, 20))
        line.add(x, 3 + 0.5 * x + numbers.normal() * 0.1)
    assert line.slope == pytest.approx(0.5, abs=0.05)
    assert line.at(10) == pytest.approx(8, abs=0.1)
    for _ in range(200):
        line.add(7, 20)
    assert line.at(7) == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(("slope", "chance", "pays"), [(0.02, 0.9, True), (0.5, 0.1, False), (2.0, 0.9, False)])
def test_drafts_that_do_not_pay_lose_little(slope, chance, pays):
    """Steps of 1 s, `slope` more for each drafted token of which `chance` are right: at most 0.5 % and a few steps."""
    costs, numbers = DraftCosts(), np.random.default_rng(0)
    seconds = tokens = drafts = 0
    for _ in range(3000):
        noise = 1 + 0.05 * numbers.normal()
        if not costs.known or costs.balance < 0 or drafts % 64 == 63:
            costs.add_plain(1, noise, 0.0)
            seconds, tokens, drafts = seconds + noise, tokens + 1, drafts + 1
            continue
        drafts += 1
        right = 0
        while right < 4 and numbers.random() < chance:
            right += 1
        step = noise + 4 * slope
        costs.add_drafted(1, 4, right, step)
        seconds, tokens = seconds + step, tokens + right + 1
    if pays:
        assert tokens / seconds > 2
    else:
        assert seconds < 1.03 * tokens + 10
