"""Several samples of one prompt: it is computed once, and each sample is what it would be by itself."""

import math
import random

import pytest

import kvpass
from kvpass.errors import InputError
from kvpass.types import Sampling
from tests.history_engine import check_idle, logits_of, make_engine, naive
from tests.speculating import Guesses, always_speculate

PROMPT = list(range(18))
DRAWN = Sampling(temperature=1.5, seed=7)


def alone(prompt, count, sampling, seed):
    """The tokens of a request that has the engine for itself."""
    options = {**vars(sampling), "seed": seed}
    return make_engine(num_blocks=64).generate([prompt], count, Sampling(**options))[0]


def steps(engine):
    """The copies of each step; filled while the engine runs."""
    seen, schedule = [], engine._scheduler.schedule

    def watch():
        step = schedule()
        engine._scheduler.check_integrity()
        seen.append(step)
        return step

    engine._scheduler.schedule = watch
    return seen


@pytest.mark.parametrize("sharing", [True, False])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared(sharing):
    engine = make_engine(num_blocks=64, prefix_sharing=sharing)
    seen = steps(engine)
    handle = engine.submit(PROMPT, 6, DRAWN, n=5)
    engine.step()
    stats = engine.stats()
    assert (stats.prefill_tokens, stats.running, stats.blocks_used, stats.blocks_shared) == (18, 5, 5, 5)
    assert [sample.num_tokens for sample in handle.samples] == [1] * 5
    engine.step()
    assert len(seen[1].copies) == 4 and len({source for source, _ in seen[1].copies}) == 1
    assert engine.stats().blocks_used == 4 + 5
    expected = [alone(PROMPT, 6, DRAWN, kvpass.sample_seed(7, index)) for index in range(5)]
    assert [sample.result() for sample in handle.samples] == expected
    assert [sample.seed for sample in handle.samples] == [kvpass.sample_seed(7, index) for index in range(5)]
    assert len({tuple(tokens) for tokens in expected}) > 1
    check_idle(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 9},  # too few for all: some are preempted
        {"num_blocks": 9, "host_memory": "1MiB"},
        {"num_blocks": 9, "prefix_sharing": False},
        {"num_blocks": 64, "max_sequences": 2},
        {"num_blocks": 64, "max_batch_tokens": 5},
    ],
)
def test_samples_are_those_of_requests_by_themselves_whatever_else_runs(options):
    engine = make_engine(**options)
    numbers = random.Random(0)
    seen = steps(engine)
    handles = [
        engine.submit(
            [numbers.randrange(40) for _ in range(numbers.randint(1, 9))] + [3], 7, DRAWN, n=numbers.randint(1, 4)
        )
        for _ in range(6)
    ]
    for handle in handles:
        prompt = handle._request.sequence.tokens[: handle.prompt_length].tolist()
        for sample in handle.samples:
            assert sample.result() == alone(prompt, 7, DRAWN, sample.seed)
    assert options["num_blocks"] > 9 or engine.stats().preemptions
    assert any(step.copies for step in seen) or "max_sequences" in options
    check_idle(engine)


def test_generate_and_stream_give_the_samples_of_each_prompt_one_after_the_other():
    engine = make_engine(num_blocks=64)
    prompts, came = [PROMPT, [5, 6], [1] * 9], {}
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    outputs = engine.generate(prompts, 5, samplings, lambda i, token: came.setdefault(i, []).append(token), n=3)
    expected = [
        alone(prompt, 5, sampling, kvpass.sample_seed(sampling.seed, index))
        for prompt, sampling in zip(prompts, samplings, strict=True)
        for index in range(3)
    ]
    assert outputs == expected == [came[index] for index in range(9)]
    streamed: dict[int, list[int]] = {}
    for index, token in engine.stream(prompts, 5, samplings, n=3):
        streamed.setdefault(index, []).append(token)
    assert [streamed[index] for index in range(9)] == expected
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(InputError, match="n="):
            engine.generate([[1]], 2, n=wrong)
    check_idle(engine)


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_one_sample_or_all_can_be_cancelled_at_any_time(steps_before):
    for which in range(3):
        engine = make_engine(num_blocks=64, max_batch_tokens=8)  # the prompt takes three steps
        handle = engine.submit(PROMPT, 6, DRAWN, n=3)
        for _ in range(steps_before):
            engine.step()
        handle.samples[which].cancel(alone=True)
        engine.check_integrity()
        for index, sample in enumerate(handle.samples):
            assert sample.result() == alone(PROMPT, 6, DRAWN, sample.seed)[: sample.num_tokens]
            assert sample.finish_reason == ("cancelled" if index == which else "length")
        check_idle(engine)
        everything = engine.submit(PROMPT, 6, DRAWN, n=3)
        everything.cancel()
        assert [sample.finish_reason for sample in everything.samples] == ["cancelled"] * 3
        check_idle(engine)


def test_a_sample_cancelled_within_the_step_that_forks_it_leaves_the_others():
    engine = make_engine(num_blocks=64)
    handle = engine.submit(PROMPT, 6, DRAWN, n=4)
    engine.module.before_step = lambda step: handle.samples[engine.module.steps].cancel(alone=True)
    engine.step()
    engine.step()
    engine.module.before_step = lambda step: None
    assert [sample.result() for sample in handle.samples][3] == alone(PROMPT, 6, DRAWN, handle.samples[3].seed)
    assert [sample.finish_reason for sample in handle.samples] == ["length", "cancelled", "cancelled", "length"]
    check_idle(engine)


def test_a_failed_step_is_undone_and_logits_that_break_end_all_samples():
    engine = make_engine(num_blocks=64)
    handle = engine.submit(PROMPT, 4, DRAWN, n=3)

    def fail(step):
        engine.module.before_step = lambda step: None
        raise MemoryError

    engine.module.before_step = fail
    with pytest.raises(MemoryError):
        engine.step()
    engine.check_integrity()
    assert [sample.result() for sample in handle.samples] == [alone(PROMPT, 4, DRAWN, s.seed) for s in handle.samples]
    engine.module.poison = 39
    broken = engine.submit([39] * 6, 4, n=3)
    for sample in broken.samples:
        with pytest.raises(kvpass.KvpassError, match="NaN"):
            sample.result()
    check_idle(engine)


def test_a_deadline_ends_samples_before_and_after_their_prompt():
    engine = make_engine(num_blocks=64, max_batch_tokens=8)
    for before in (0, 1, 5):
        handle = engine.submit(PROMPT, 50, DRAWN, n=3, deadline=100.0)
        for _ in range(before):
            engine.step()
        clock = engine._scheduler._deadlines._clock
        engine._scheduler._deadlines._clock = lambda clock=clock: clock() + 1000
        assert len({len(sample.result()) for sample in handle.samples}) == 1
        assert [sample.finish_reason for sample in handle.samples] == ["deadline"] * 3
        engine._scheduler._deadlines._clock = clock
        check_idle(engine)


def test_each_sample_ends_at_its_own_stop_string_and_has_its_own_logprobs():
    def spell(tokens):
        return "".join(chr(65 + token) for token in tokens)

    engine = make_engine(num_blocks=64)
    engine._decode = spell
    free = engine.submit(PROMPT, 8, DRAWN, n=3)
    whole = [spell(sample.result()) for sample in free.samples]
    stop = whole[1][2:4]
    sampling = Sampling(temperature=1.5, seed=7, stop=(stop,), logprobs=1)
    handle = engine.submit(PROMPT, 8, sampling, n=3)
    for sample, text in zip(handle.samples, whole, strict=True):
        sample.result()
        assert sample.text == text.split(stop)[0]
        assert sample.finish_reason == ("stop" if stop in text else "length")
        history = PROMPT
        for token, entry in zip(sample.tokens, sample.logprobs, strict=True):
            scores = logits_of(history).astype(float)
            assert entry.logprob == pytest.approx(scores[token] - float(_log_sum_exp(scores)), abs=1e-4)
            history = [*history, token]
    check_idle(engine)


def _log_sum_exp(scores):
    return scores.max() + math.log(sum(map(math.exp, scores - scores.max())))


@pytest.mark.parametrize("max_new_tokens", [1, 9])
def test_samples_that_are_drafted_are_the_same(max_new_tokens):
    engine = make_engine(num_blocks=64)
    prompt, drawn = [1, 2, 3, 1, 2, 3, 1], Sampling(temperature=0.7, seed=3)
    always_speculate(engine, Guesses([(prompt, alone(prompt, 9, drawn, 3))]))
    handle = engine.submit(prompt, max_new_tokens, drawn, n=4)
    for sample in handle.samples:
        assert sample.result() == alone(prompt, max_new_tokens, drawn, sample.seed)
    greedy = engine.generate([prompt], 6, n=2)
    assert greedy == [naive(prompt, 6)] * 2
    assert engine.stats().drafted_tokens or max_new_tokens == 1
    check_idle(engine)
