"""Beam search over forks, against one that recomputes everything with plain lists; tests/parity has transformers."""

import itertools
from threading import Thread

import pytest
import torch

from kvpass.errors import CapacityError, InputError, KvpassError
from kvpass.types import Sampling
from tests.history_engine import VOCABULARY, check_idle, logits_of, make_engine, naive
from tests.speculating import Guesses, always_speculate

PROMPT = [1, 2, 3, 4, 5]


def naive_beams(prompt, count, beams, length_penalty=1.0, early_stopping=False, ends=()):
    """Outputs and scores, the best first."""
    running, found = [([], 0.0)], []
    for length in range(1, count + 1):
        candidates = [
            (logprob + more, [*tokens, token])
            for tokens, logprob in running
            for token, more in enumerate(torch.from_numpy(logits_of(prompt + tokens)).log_softmax(-1).tolist())
        ]
        candidates = sorted(candidates, key=lambda pair: -pair[0])[: max(2, 1 + len(ends)) * beams]
        ended = [length == count or tokens[-1] in ends for _, tokens in candidates]
        best = list(zip(candidates, ended, strict=True))[:beams]
        found += [(logprob / length**length_penalty, tokens) for (logprob, tokens), end in best if end]
        found = sorted(found, key=lambda pair: -pair[0])[:beams]
        running = [(t, s) for (s, t), end in zip(candidates, ended, strict=True) if not end][:beams]
        if len(found) == beams and running:
            furthest = count if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0][1] / furthest**length_penalty <= found[-1][0]:
                break
    return found


def assert_equal(found, expected):
    assert [beam.tokens for beam in found] == [tokens for _, tokens in expected]
    assert [beam.score for beam in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def check_every_step(engine):
    """Check every invariant after each step; gives the steps."""
    seen, commit = [], engine._scheduler.commit

    def watch(step, *given):
        commit(step, *given)
        engine._scheduler.check_integrity()
        seen.append(step)

    engine._scheduler.commit = watch
    return seen


@pytest.mark.parametrize("beams", [1, 4])
def test_outputs_are_those_of_a_search_that_recomputes_everything(beams):
    engine = make_engine(num_blocks=64)
    check_every_step(engine)
    for penalty, stopping, ends in itertools.product((1.0, 0.0, -1.0), (False, True, "never"), ((), (3, 7, 9))):
        options = {"length_penalty": penalty, "early_stopping": stopping}
        found = engine.beam_search(PROMPT, 6, beams=beams, **options, eos_token_ids=ends)
        assert_equal(found, naive_beams(PROMPT, 6, beams, **options, ends=ends))
        check_idle(engine)
    assert beams > 1 or engine.beam_search(PROMPT, 6, beams=1)[0].tokens == naive(PROMPT, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 5},  # one output fits, and nothing beside it
        {"num_blocks": 5, "prefix_sharing": False},
        {"num_blocks": 8, "host_memory": "1MiB"},
        {"num_blocks": 64, "max_sequences": 1},
        {"num_blocks": 64, "max_batch_tokens": 2},
        {"num_blocks": 64, "max_sequences": 3},
    ],
)
def test_outputs_are_the_same_where_not_all_beams_have_room(options):
    engine = make_engine(**options)
    steps = check_every_step(engine)
    assert_equal(engine.beam_search(PROMPT * 2, 9, beams=4), naive_beams(PROMPT * 2, 9, 4))
    assert any(step.copies for step in steps) or options.get("max_sequences") == 1
    check_idle(engine)


def test_beams_share_the_prompt_and_what_they_have_in_common():
    engine = make_engine(num_blocks=64, prefix_sharing=False)
    prompt = PROMPT * 8
    steps = check_every_step(engine)
    engine.beam_search(prompt, 12, beams=4)
    stats = engine.stats()
    assert stats.prefill_tokens == len(prompt)
    assert stats.bytes_peak_used <= (10 + 4 * 4 + 4) * stats.bytes_reserved // stats.blocks_total
    assert max(len(step.ranges) for step in steps) == 4
    assert all(len({target for _, target in step.copies}) == len(step.copies) for step in steps)


def test_searches_and_other_requests_run_beside_each_other():
    engine = make_engine(num_blocks=24, max_sequences=6)
    always_speculate(engine, Guesses([([9, 8, 7], naive([9, 8, 7], 30))]))
    check_every_step(engine)
    handles = [engine.submit([9, 8, 7], 30), engine.submit(PROMPT, 20, Sampling(temperature=1.0, seed=1), n=2)]
    assert_equal(engine.beam_search(PROMPT, 10, beams=3), naive_beams(PROMPT, 10, 3))
    found = {}

    def search(index):
        found[index] = engine.beam_search([index, 4], 7, beams=3)

    threads = [Thread(target=search, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index in range(3):
        assert_equal(found[index], naive_beams([index, 4], 7, 3))
    assert handles[0].result() == naive([9, 8, 7], 30)
    assert [len(sample.result()) for sample in handles[1].samples] == [20, 20]
    check_idle(engine)


def test_a_search_that_is_interrupted_leaves_nothing_behind():
    for place in (1, 2, 5):
        engine = make_engine(num_blocks=64)

        def fail(step, engine=engine, place=place):
            if engine.module.steps == place:
                raise KeyboardInterrupt

        engine.module.before_step = fail
        with pytest.raises(KeyboardInterrupt):
            engine.beam_search(PROMPT, 10, beams=3)
        check_idle(engine)
        assert_equal(engine.beam_search(PROMPT, 10, beams=3), naive_beams(PROMPT, 10, 3))


@pytest.mark.parametrize("name", ["add_twins", "extend", "cancel"])
def test_a_search_that_is_interrupted_while_its_beams_change_leaves_nothing_behind(name):
    engine = make_engine(num_blocks=64)
    original, calls = getattr(engine._scheduler, name), iter(range(100))

    def interrupt(*arguments):
        original(*arguments)
        if next(calls) == 4:
            raise KeyboardInterrupt

    setattr(engine._scheduler, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.beam_search(PROMPT, 10, beams=3)
    setattr(engine._scheduler, name, original)
    check_idle(engine)


def test_logits_that_break_end_the_search_and_nothing_else():
    engine = make_engine(num_blocks=64)
    engine.module.poison = 39
    handle = engine.submit(PROMPT, 12)
    with pytest.raises(KvpassError, match="NaN or infinity"):
        engine.beam_search([39, 1], 5, beams=3)
    assert handle.result() == naive(PROMPT, 12)
    check_idle(engine)


def test_the_end_of_sequence_tokens_of_the_model_end_an_output_unless_others_are_named():
    first = make_engine().beam_search(PROMPT, 6, beams=2)[0].tokens
    engine = make_engine(eos=(first[1],))
    assert_equal(engine.beam_search(PROMPT, 6, beams=2), naive_beams(PROMPT, 6, 2, ends=(first[1],)))
    assert_equal(engine.beam_search(PROMPT, 6, beams=2, eos_token_ids=()), naive_beams(PROMPT, 6, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams=0"),
        ({"beams": 2.0}, "beams=2.0"),
        ({"beams": True}, "beams=True"),
        ({"beams": VOCABULARY}, "ask for fewer beams"),
        ({"beams": 2, "length_penalty": "long"}, "length_penalty='long'"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"beams": 2, "early_stopping": "soon"}, "early_stopping='soon'"),
        ({"beams": 2, "early_stopping": 1}, "early_stopping=1"),
        ({"beams": 2, "eos_token_ids": 3}, "eos_token_ids=3"),
        ({"beams": 2, "eos_token_ids": [VOCABULARY]}, "ids are 0 to 39"),
        ({"beams": 2, "namespace": 3}, "namespace=3"),
    ],
)
def test_bad_options_are_refused(options, message):
    engine = make_engine()
    with pytest.raises(InputError, match=message):
        engine.beam_search(PROMPT, 4, **options)
    check_idle(engine)


def test_what_cannot_fit_or_comes_after_the_end_is_refused():
    engine = make_engine(num_blocks=2)
    with pytest.raises(CapacityError):
        engine.beam_search(PROMPT, 9, beams=2)
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.beam_search(PROMPT, 2, beams=2)
