"""Speculative decoding gives the tokens of plain decoding, whatever is proposed and whatever else runs."""

import pytest

import kvpass
from kvpass.errors import ConfigError, InputError
from kvpass.types import Sampling
from tests.history_engine import check_idle, make_engine, naive, ragged
from tests.speculating import Guesses, always_speculate, counts_of_a_twins_drafts


@pytest.mark.parametrize("mistakes", [0.0, 0.4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 12},
        {"max_batch_tokens": 7, "max_sequences": 3},
        {"prefix_sharing": False},
        {"block_size": 1, "num_blocks": 128},
    ],
    ids=["plain", "preempted", "chunked", "unshared", "blocks of one"],
)
def test_tokens_are_those_of_plain_decoding(options, mistakes):
    prompts = ragged(9)
    expected = [naive(prompt, 15) for prompt in prompts]
    drafter = Guesses(zip(prompts, expected, strict=True), mistakes)
    engine = always_speculate(make_engine(**options), drafter)
    for _ in range(2):
        assert engine.generate(prompts, 15) == expected
        check_idle(engine)
    counts = engine._scheduler.counts
    assert counts.drafted_tokens > 50
    assert counts.accepted_tokens > 0.7 * counts.drafted_tokens if mistakes == 0 else counts.accepted_tokens >= 0
    assert not drafter.sequences, "the drafter was not told that a sequence has ended"
    if options.get("num_blocks") == 12:
        assert counts.preemptions > 0


def test_right_drafts_save_steps():
    prompt = [3, 1, 4]
    plain = make_engine()
    expected = plain.generate([prompt], 40)
    engine = always_speculate(make_engine(), Guesses([(prompt, expected[0])], mistakes=0))
    assert engine.generate([prompt], 40) == expected
    assert plain.module.steps == 40 and engine.module.steps <= 10


def test_a_stop_token_among_the_drafted_ones_ends_the_request():
    prompts = ragged(8)
    stops = [naive(prompt, 20)[9] for prompt in prompts]
    expected = [naive(prompt, 20, (stop,)) for prompt, stop in zip(prompts, stops, strict=True)]
    drafter = Guesses([(prompt, naive(prompt, 20)) for prompt in prompts], mistakes=0)
    engine = always_speculate(make_engine(), drafter)
    assert engine.generate(prompts, 20, [Sampling(stop_token_ids=(stop,)) for stop in stops]) == expected
    check_idle(engine)


def test_seeds_give_the_same_tokens_drafted_or_not_alone_or_in_any_mix():
    prompts = ragged(10)
    samplings = [Sampling(temperature=1.5, top_k=index % 3 * 10, top_p=0.95, seed=index % 4) for index in range(10)]
    alone = [make_engine().generate([p], 12, s)[0] for p, s in zip(prompts, samplings, strict=True)]
    for mistakes in (0.0, 0.5):
        for options in ({}, {"num_blocks": 12, "max_batch_tokens": 7}, {"prefix_sharing": False, "max_sequences": 3}):
            engine = always_speculate(make_engine(**options), Guesses(zip(prompts, alone, strict=True), mistakes))
            assert engine.generate(prompts, 12, samplings) == alone
            assert engine._scheduler.counts.accepted_tokens > 0


def test_requests_whose_options_look_back_run_beside_drafted_ones():
    prompts = ragged(6)
    samplings = [Sampling(repetition_penalty=1.3), Sampling(logprobs=2), Sampling()] * 2
    expected = make_engine().generate(prompts, 12, samplings)
    engine = always_speculate(make_engine(), Guesses(zip(prompts, expected, strict=True), 0.2))
    assert engine.generate(prompts, 12, samplings) == expected
    assert engine._scheduler.counts.drafted_tokens > 0
    check_idle(engine)


@pytest.mark.parametrize("at", [2, 4])
def test_a_step_that_fails_with_drafts_in_it_is_undone(at):
    prompts = ragged(6)
    expected = [naive(prompt, 12) for prompt in prompts]
    engine = always_speculate(make_engine(num_blocks=24), Guesses(zip(prompts, expected, strict=True), 0.3))
    handles = [engine.submit(prompt, 12) for prompt in prompts]

    def fail(step):
        if engine.module.steps == at:
            raise RuntimeError("no luck")

    engine.module.before_step = fail
    with pytest.raises(RuntimeError):
        handles[0].result()
    engine.check_integrity()
    assert [handle.result() for handle in handles] == expected
    check_idle(engine)


def test_prompt_lookup_drafts_what_repeats_itself():
    prompts = [[1, 2, 3, 4] * 5, list(range(20)), [7] * 10]
    engine = always_speculate(make_engine(), kvpass.PromptLookup((2, 1)))
    assert engine.generate(prompts, 20) == [naive(prompt, 20) for prompt in prompts]
    assert engine._scheduler.counts.drafted_tokens > 0
    assert not engine.drafter._indexes
    check_idle(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 12, "max_batch_tokens": 7}], ids=["plain", "tight"])
def test_another_engine_drafts(temperature, options):
    """With seeds, because both draw with one number."""
    counts = counts_of_a_twins_drafts(temperature, options)
    assert counts.accepted_tokens > 0.9 * counts.drafted_tokens > 0


def test_an_engine_that_cannot_hold_a_sequence_drafts_nothing_for_it():
    prompts = [[1] * 30, [2] * 6]
    small = make_engine(num_blocks=4)
    short = make_engine(max_length=20)
    for drafting in (small, short):
        engine = always_speculate(make_engine(), kvpass.DraftEngine(drafting))
        assert engine.generate(prompts, 8) == [naive(prompt, 8) for prompt in prompts]
        assert engine._scheduler.counts.accepted_tokens > 0


def test_a_draft_engine_that_fails_drafts_nothing():
    small = make_engine()
    small.module.poison = 1
    engine = always_speculate(make_engine(), kvpass.DraftEngine(small))
    assert engine.generate([[1, 2], [3, 4]], 8) == [naive([1, 2], 8), naive([3, 4], 8)]
    check_idle(small)


class Clock:
    """Stands for the module time: it goes on when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("kvpass.engine.step_loop.time", clock)
    return clock


def test_drafts_that_do_not_pay_are_not_computed(clock):
    """A step takes 1 s, and 0.5 s more for each drafted token, all of which are wrong."""
    engine = make_engine(num_blocks=256)
    engine.speculate(Guesses(mistakes=1.0, max_draft=8))

    def compute(step):
        clock.now += 1 + 0.5 * (len(step.token_ids) - 1)

    engine.module.before_step = compute
    engine.generate([[1, 2, 3]], 300)
    assert engine._scheduler.counts.drafted_tokens > 0
    assert clock.now < 1.0 + 1.03 * 300
    engine.speculate(None)
    assert engine.drafter is None
    assert engine.generate([[1, 2, 3]], 5) == [naive([1, 2, 3], 5)]


def test_drafts_that_pay_are_computed(clock):
    """A step takes 1 s, and 0.05 s more for each drafted token, all of which are right."""
    engine = make_engine(num_blocks=256)
    expected = naive([1, 2, 3], 300)
    engine.speculate(Guesses([([1, 2, 3], expected)], mistakes=0.0))

    def compute(step):
        clock.now += 1 + 0.05 * (len(step.token_ids) - 1)

    engine.module.before_step = compute
    assert engine.generate([[1, 2, 3]], 300) == [expected]
    assert clock.now < 300 / 4


@pytest.mark.parametrize("branches", [1, 3])
def test_what_a_tree_may_have_is_no_price_where_it_has_one_path(clock, branches):
    """A step takes 1 s, and 0.4 s more for each drafted token: three for every one that is right would not pay."""
    engine = make_engine(num_blocks=256)
    expected = naive([1, 2, 3], 300)
    drafter = Guesses([([1, 2, 3], expected)], mistakes=0.0)
    drafter.branches = branches
    engine.speculate(drafter)

    def compute(step):
        clock.now += 1 + 0.4 * (len(step.token_ids) - 1)

    engine.module.before_step = compute
    assert engine.generate([[1, 2, 3]], 300) == [expected]
    assert clock.now < 300 * 0.6


class Proposes:
    cheap, max_draft = True, 4

    def __init__(self, draft):
        self.draft = draft

    def propose(self, sequences, counts):
        return [self.draft for _ in sequences]

    def forget(self, sequence):
        pass


@pytest.mark.parametrize("draft", [[40], [-1], [1.0], [1] * 5, ["a"]])
def test_a_drafter_that_proposes_nonsense_is_told_so(draft):
    engine = always_speculate(make_engine(), Proposes(draft))
    handle = engine.submit([1, 2], 8)
    with pytest.raises(InputError, match="the drafter proposed"):
        handle.result()
    engine.check_integrity()
    engine.speculate(None)
    assert handle.result() == naive([1, 2], 8)
    check_idle(engine)


def test_drafters_that_do_not_fit_are_refused():
    engine, other = make_engine(), make_engine()
    with pytest.raises(ConfigError, match="no drafter"):
        engine.speculate("prompt lookup")
    with pytest.raises(ConfigError, match="not of a str"):
        kvpass.DraftEngine("small")
    with pytest.raises(ConfigError, match="max_draft=0"):
        kvpass.DraftEngine(other, max_draft=0)
    with pytest.raises(ConfigError, match="for itself"):
        engine.speculate(kvpass.DraftEngine(engine))
    other.speculate(kvpass.DraftEngine(engine))
    with pytest.raises(ConfigError, match="for itself"):
        engine.speculate(kvpass.DraftEngine(other))
    wide = make_engine(vocabulary=41)
    with pytest.raises(ConfigError, match="vocabulary of 41 tokens"):
        engine.speculate(kvpass.DraftEngine(wide))
