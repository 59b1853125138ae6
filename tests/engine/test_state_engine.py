"""Recurrent states in the engine: tokens are those of a plain loop, whatever runs, waits, forks, ends or fails."""

import math
import random
from dataclasses import replace

import pytest
import torch

import kvpass
from kvpass.errors import ConfigError, KvpassError
from kvpass.runtime.sequences.requests import sample_seed
from kvpass.types import Sampling, StateSpec
from tests.history_engine import ragged
from tests.state_engine import STATES, check_idle, logits_of, make_engine, naive, slots_used, step_all

DRAWN = Sampling(temperature=1.0, seed=5)


def expect(prompts, count):
    return [naive(prompt, count) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 7},
        {"max_sequences": 3},
        {"num_blocks": 22},
        {"num_blocks": 14, "max_batch_tokens": 5},
        {"caches": ()},
    ],
    ids=["at once", "chunks", "queued", "preempted", "preempted in chunks", "states alone"],
)
def test_tokens_are_those_of_a_plain_loop(options):
    engine, prompts = make_engine(**options), ragged(10)
    handles = [engine.submit(prompt, 16) for prompt in prompts]
    step_all(engine)
    assert [handle.result() for handle in handles] == expect(prompts, 16)
    assert (engine.stats().preemptions > 0) == ("num_blocks" in options)
    assert engine.stats().prefix_hit_tokens == 0


def test_no_prefix_is_taken_over_whose_state_is_not_in_blocks():
    engine, prompt = make_engine(), list(range(20))
    assert engine.generate([prompt, prompt], 4) == expect([prompt, prompt], 4) == engine.generate([prompt, prompt], 4)
    assert engine.stats().blocks_cached == engine.stats().prefix_hit_tokens == 0


def test_a_request_of_a_higher_priority_displaces_another_with_its_state():
    engine, prompts = make_engine(max_sequences=1), ragged(2, seed=3)
    first = engine.submit(prompts[0], 8)
    for _ in range(3):
        engine.step()
    second = engine.submit(prompts[1], 4, priority=5)
    step_all(engine)
    assert engine.stats().preemptions == 1
    assert [first.result(), second.result()] == [naive(prompts[0], 8), naive(prompts[1], 4)]


def test_cancelled_requests_give_their_slots_to_others():
    engine, prompts = make_engine(max_sequences=4), ragged(12, seed=4)
    handles = [engine.submit(prompt, 6) for prompt in prompts]
    for victim in (0, 2, 5, 11):
        engine.step()
        handles[victim].cancel()
        engine.check_integrity()
    step_all(engine)
    for place in (1, 3, 4, 6, 7, 8, 9, 10):
        assert handles[place].result() == naive(prompts[place], 6)


def test_a_request_cancelled_by_its_own_step_leaves_nothing():
    engine, (prompt, other) = make_engine(), ragged(2, seed=5)
    handle, beside = engine.submit(prompt, 6), engine.submit(other, 6)
    engine.module.before_return = lambda step: handle.cancel()
    step_all(engine)
    assert beside.result() == naive(other, 6)


@pytest.mark.parametrize("options", [{}, {"max_sequences": 2}, {"num_blocks": 9}, {"max_batch_tokens": 5}])
def test_samples_go_on_from_a_copy_of_the_state(options):
    prompts = ragged(3, seed=6)
    found = make_engine(**options).generate(prompts, 6, DRAWN, n=3)
    alone = make_engine()
    for place, tokens in enumerate(found):
        seed = sample_seed(DRAWN.seed, place % 3)
        assert alone.generate([prompts[place // 3]], 6, Sampling(temperature=1.0, seed=seed)) == [tokens]
    assert len({tuple(tokens) for tokens in found}) > 3  # they do differ


def test_samples_whose_leader_ends_with_its_first_token_still_get_its_state():
    engine, alone = make_engine(max_sequences=3), make_engine()
    ended = 0
    for seed in range(8):
        prompt, sampling = ragged(1, seed=seed)[0], Sampling(temperature=2.0, seed=seed)
        first = alone.generate([prompt], 1, sampling)[0][0]
        options = {"temperature": 2.0, "stop_token_ids": (first,)}
        handle = engine.submit(prompt, 5, Sampling(seed=seed, **options), n=3)
        waiting = engine.submit([3, 1, 4], 5)  # takes the slot of the leader in the same step as it is copied
        step_all(engine)
        assert handle.result() == [first]
        assert waiting.result() == naive([3, 1, 4], 5)
        for index, sample in enumerate(handle.samples):
            drawn = Sampling(seed=sample_seed(seed, index), **options)
            assert [sample.result()] == alone.generate([prompt], 5, drawn)
            ended += len(sample.result()) > 1
    assert ended > 8


@pytest.mark.parametrize("options", [{}, {"max_sequences": 2}, {"num_blocks": 12}])
def test_beams_score_what_a_plain_loop_gives_them(options):
    engine, (prompt,) = make_engine(**options), ragged(1, seed=8)
    found = engine.beam_search(prompt, 5, beams=4, eos_token_ids=(7, 9))
    check_idle(engine)
    assert len({tuple(beam.tokens) for beam in found}) == 4
    for beam in found:
        total, tokens = 0.0, list(prompt)
        for token in beam.tokens:
            total += float(torch.from_numpy(logits_of(tokens)).log_softmax(0)[token])
            tokens.append(token)
        assert math.isclose(beam.score, total / len(beam.tokens), rel_tol=1e-5)
    assert [beam.tokens for beam in found] == [
        beam.tokens for beam in make_engine().beam_search(prompt, 5, beams=4, eos_token_ids=(7, 9))
    ]


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_step_that_fails_after_it_wrote_states_is_computed_anew(fails_at):
    engine, prompts, steps = make_engine(max_batch_tokens=30), ragged(6, seed=9), []

    def fail_once(step):
        steps.append(step)
        if len(steps) == fails_at:
            raise RuntimeError("out of memory")

    engine.module.before_return = fail_once
    handles = [engine.submit(prompt, 5) for prompt in prompts]
    with pytest.raises(RuntimeError, match="out of memory"):
        step_all(engine)
    engine.check_integrity()
    assert slots_used(engine) == 0
    step_all(engine)
    assert [handle.result() for handle in handles] == expect(prompts, 5)


def test_an_interrupt_while_blocks_change_hands_starts_all_slots_anew(monkeypatch):
    engine, prompts = make_engine(), ragged(4, seed=10)
    handles = [engine.submit(prompt, 5) for prompt in prompts]
    engine.step()
    monkeypatch.setattr(engine._scheduler._holdings, "give_back_passed", lambda sequences: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.undo()
    engine.check_integrity()
    assert slots_used(engine) == 0
    step_all(engine)
    assert [handle.result() for handle in handles] == expect(prompts, 5)


def test_a_request_with_broken_logits_ends_alone():
    engine = make_engine()
    engine.module.poison = 39
    broken, sound = engine.submit([1, 39], 4), engine.submit([1, 2], 1)
    step_all(engine)
    with pytest.raises(KvpassError, match="NaN"):
        broken.result()
    assert sound.result() == naive([1, 2], 1)


def test_random_requests_cancellations_and_failures_leave_every_state_right():
    numbers, engine = random.Random(0), make_engine(num_blocks=14, max_sequences=5, max_batch_tokens=11)
    under_way, drawn, failures = [], [], 0

    def fail_now_and_then(step):
        if numbers.random() < 0.05:
            raise RuntimeError("now and then")

    engine.module.before_return = fail_now_and_then
    for turn in range(250):
        if len(under_way) < 8 and numbers.random() < 0.4:
            prompt, temperature = ragged(1, seed=turn)[0], numbers.choice((0.0, 1.0))
            sampling, priority = Sampling(temperature=temperature, seed=turn), numbers.choice((0, 0, 9))
            handle = engine.submit(prompt, 5, sampling, n=numbers.choice((1, 1, 3)), priority=priority)
            under_way.append((prompt, handle, sampling))
        if under_way and numbers.random() < 0.05:
            under_way.pop(numbers.randrange(len(under_way)))[1].cancel()
        try:
            engine.step()
        except RuntimeError:
            failures += 1
        engine.check_integrity()
        assert slots_used(engine) == engine.stats().running
        for entry in [entry for entry in under_way if all(sample.done for sample in entry[1].samples)]:
            under_way.remove(entry)
            drawn += [(entry[0], i, sample.result(), entry[2]) for i, sample in enumerate(entry[1].samples)]
    engine.module.before_return = lambda step: None
    under_way.clear()
    step_all(engine)
    assert len(drawn) > 40 and failures > 5 and engine.stats().preemptions > 5
    prompts, _, found, _ = zip(*drawn, strict=True)
    alone = [replace(sampling, seed=sample_seed(sampling.seed, i)) for _, i, _, sampling in drawn]
    assert list(found) == make_engine(num_blocks=1000).generate(prompts, 5, alone)
    assert all(tokens == naive(prompt, 5) for prompt, _, tokens, sampling in drawn if not sampling.temperature)


def test_states_are_counted_where_memory_is():
    per_sequence = 8 + 4 * 6
    engine = make_engine(memory=10_000, max_sequences=10, max_batch_tokens=8)
    assert [tuple(state.shape) for state in engine._loop.states] == [(8,), (8, 2, 3)]  # one for each that may run
    held = [*engine._loop.states, *(tensor for pair in engine.caches for tensor in pair)]
    assert engine.stats().bytes_reserved == sum(tensor.nbytes for tensor in held)
    assert engine.stats().blocks_total == (10_000 - 8 * per_sequence) // 32
    engine.close()
    assert engine._loop.states == ()


def test_what_does_not_go_with_states_is_refused():
    with pytest.raises(ConfigError, match="cannot be taken back: leave out drafts"):
        make_engine().speculate(kvpass.PromptLookup())
    for options in ({"host_memory": "1MiB"}, {"disk": "somewhere"}):
        with pytest.raises(ConfigError, match="not kept with blocks: leave host_memory and disk out"):
            make_engine(**options)
    with pytest.raises(ConfigError, match=r"of the 4 sequences that may run at once take 128 bytes, .* memory=160"):
        make_engine(memory=159, max_sequences=4)
    assert make_engine(memory=160, max_sequences=4).stats().blocks_total == 1
    with pytest.raises(ConfigError, match="could not be allocated on cpu: give a smaller max_sequences"):
        make_engine(states=(StateSpec("huge", (2**50,), torch.float32),))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (STATES[0], "two states of the plan have the name 'hash'"),
        (StateSpec("a", (2, 0), torch.float32), r"the state 'a' has the shape \(2, 0\)"),
        (StateSpec("a", (True,), torch.float32), "the state 'a' has the shape"),
        (StateSpec("a", (2,), "float32"), "the state 'a' has the dtype 'float32': give a torch.dtype"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(states=(*STATES, spec))
