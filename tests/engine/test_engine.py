"""The engine over a module that computes its logits from what it reads back through the block tables."""

import gc
import random
import threading

import pytest
import torch

from kvpass.errors import CapacityError, ConfigError, InputError, KvpassError
from kvpass.types import Sampling
from tests.history_engine import VOCABULARY, check_idle, make_engine, naive, ragged

STOP = 7


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few elements are not worth waiting for a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [1, 5, 2048])
@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("block_size", [1, 4])
def test_tokens_equal_those_without_a_cache(sharing, max_batch_tokens, num_blocks, block_size):
    engine = make_engine(
        num_blocks=num_blocks * 4 // block_size,
        block_size=block_size,
        prefix_sharing=sharing,
        max_batch_tokens=max_batch_tokens,
        max_sequences=6,
    )
    prompts = ragged(14)
    for _ in range(2):
        assert engine.generate(prompts, max_new_tokens=12) == [naive(prompt, 12) for prompt in prompts]
        check_idle(engine)
    assert (engine.stats().prefix_hit_tokens > 0) == sharing
    if num_blocks == 12 and max_batch_tokens > 1:
        assert engine.stats().preemptions > 0


def test_the_copies_of_a_step_are_made_before_it_is_computed(monkeypatch):
    engine = make_engine(num_blocks=8, prefix_sharing=False)
    schedule, moved = engine._scheduler.schedule, []

    def schedule_elsewhere():
        """The sequence moves on to another block at each step, and its content has to follow."""
        step = schedule()
        for sequence, start, _ in step.ranges:
            if start:
                (new,) = engine._pool.allocate(1)
                old = sequence.tables[0].replace(0, new)
                engine._pool.release([old])
                object.__setattr__(step, "copies", ((old, new),))
                moved.append(new)
        return step

    monkeypatch.setattr(engine._scheduler, "schedule", schedule_elsewhere)
    assert engine.generate([[3, 1]], 9) == [naive([3, 1], 9)]
    assert len(moved) == 8
    check_idle(engine)


def test_tokens_come_in_order_through_callback_and_stream():
    engine = make_engine()
    prompts = ragged(5)
    expected = [naive(prompt, 8) for prompt in prompts]
    called: list[list[int]] = [[] for _ in prompts]
    engine.generate(prompts, 8, on_token=lambda index, token: called[index].append(token))
    streamed: list[list[int]] = [[] for _ in prompts]
    for index, token in engine.stream(prompts, 8):
        streamed[index].append(token)
    assert called == streamed == expected


def test_stop_tokens_end_a_prompt_and_are_included():
    prompts = ragged(8)
    stopped = [naive(prompt, 60, (STOP,)) for prompt in prompts]
    assert sum(len(tokens) < 60 for tokens in stopped) > 3
    options = Sampling(stop_token_ids=(STOP,))
    assert make_engine(num_blocks=256).generate(prompts, 60, options) == stopped
    assert make_engine(num_blocks=256, eos=(STOP,)).generate(prompts, 60) == stopped
    endless = make_engine(num_blocks=256, eos=(STOP,)).generate(prompts, 60, Sampling(ignore_eos=True))
    assert endless == [naive(prompt, 60) for prompt in prompts]


def test_a_prefix_is_computed_once_within_a_call_and_across_calls():
    engine = make_engine(num_blocks=128)
    prefix = list(range(32))
    prompts = [[*prefix, token] for token in range(8)]
    engine.generate(prompts, 1)
    assert engine.stats().prefill_tokens == 32 + 8
    assert engine.stats().prefix_hit_tokens == 7 * 32
    engine.generate([[*prefix, 39]], 1)
    assert engine.stats().prefill_tokens == 32 + 9
    assert engine.stats().blocks_cached == 8
    engine.clear_prefix_cache()
    assert engine.stats().blocks_cached == 0
    check_idle(engine)
    engine.generate([prompts[0]], 1)
    assert engine.stats().prefill_tokens == 32 + 9 + 33


def test_closing_a_stream_frees_everything():
    engine = make_engine(max_sequences=2)
    prompts = ragged(6)
    engine.stream(prompts, 10)
    check_idle(engine)
    stream = engine.stream(prompts, 10)
    next(stream)
    assert engine.stats().blocks_used > 0 and engine.stats().waiting > 0
    stream.close()
    check_idle(engine)
    for _ in engine.stream(prompts, 10):
        break
    gc.collect()
    check_idle(engine)
    assert engine.generate(prompts, 10) == [naive(prompt, 10) for prompt in prompts]


def test_a_stream_collected_in_the_middle_of_a_step_is_dropped_after_it():
    engine = make_engine()
    streams = [engine.stream(ragged(3), 50)]
    next(streams[0])
    engine.module.before_step = lambda step: streams.clear()
    assert engine.generate([[1, 2]], 5) == [naive([1, 2], 5)]
    check_idle(engine)


def test_interleaved_streams_get_their_own_tokens():
    engine = make_engine(num_blocks=24, max_sequences=5)
    batches = [ragged(3, seed) for seed in range(4)]
    streams = [engine.stream(prompts, 9) for prompts in batches]
    outputs = [[[] for _ in prompts] for prompts in batches]
    numbers, alive = random.Random(1), list(range(4))
    while alive:
        chosen = numbers.choice(alive)
        try:
            index, token = next(streams[chosen])
            outputs[chosen][index].append(token)
        except StopIteration:
            alive.remove(chosen)
        engine.check_integrity()
    assert outputs == [[naive(prompt, 9) for prompt in prompts] for prompts in batches]
    check_idle(engine)


def test_calls_from_several_threads_get_their_own_tokens():
    engine = make_engine(num_blocks=24, max_sequences=5)
    batches = [ragged(6, seed) for seed in range(4)]
    outputs = [None] * 4

    def work(index):
        outputs[index] = engine.generate(batches[index], 10)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert outputs == [[naive(prompt, 10) for prompt in prompts] for prompts in batches]
    check_idle(engine)


def test_a_callback_may_use_the_engine_and_may_raise():
    engine = make_engine()
    inner = []

    def nested(index, token):
        if len(inner) < 3:
            inner.append(engine.generate([[token]], 2) == [naive([token], 2)])

    assert engine.generate([[1, 2, 3]], 6, on_token=nested) == [naive([1, 2, 3], 6)]
    assert inner == [True] * 3

    def raising(index, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(ragged(4), 6, on_token=raising)
    check_idle(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_module_that_raises_leaves_nothing_behind(error, at):
    engine = make_engine(num_blocks=24, max_batch_tokens=16)
    prompts = ragged(6)
    other = engine.stream([[1, 2, 3]], 12)
    received = [next(other)[1]]

    def fail(step):
        if engine.module.steps == at + 1:
            raise error("no luck")

    engine.module.before_step = fail
    with pytest.raises(error, match="no luck"):
        engine.generate(prompts, 10)
    engine.check_integrity()
    assert engine.stats().blocks_used == 0
    registered = sorted(engine._pool.kept_blocks())
    assert not engine.caches[0][0][registered].isnan().any(), "a block that was never computed is registered"
    assert engine.generate(prompts, 10) == [naive(prompt, 10) for prompt in prompts]
    received += [token for _, token in other]
    assert received == naive([1, 2, 3], 12)
    check_idle(engine)


def test_an_interrupt_in_the_scheduler_leaves_nothing_behind(monkeypatch):
    engine = make_engine(num_blocks=24)
    other = engine.stream([[1, 2, 3]], 12)
    received = [next(other)[1]]
    original = engine._pool.allocate

    def interrupted(count):
        original(count)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._pool, "allocate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ragged(6), 10)
    engine.check_integrity()
    assert engine.stats().blocks_used == 0
    received += [token for _, token in other]
    assert received == naive([1, 2, 3], 12)
    check_idle(engine)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1, seed=3)])
def test_logits_that_are_not_finite_fail_their_own_call_only(sampling):
    engine = make_engine()
    other = engine.stream([[1, 2, 3]], 12)
    received = [next(other)[1]]
    engine.module.poison = 39
    with pytest.raises(KvpassError, match=r"NaN or infinity for prompts\[1\] after 0 new tokens"):
        engine.generate([[4] * 9, [39] * 9], 5, sampling)
    received += [token for _, token in other]
    assert received == naive([1, 2, 3], 12)
    check_idle(engine)
    engine.module.poison = None
    assert engine.generate([[39] * 9], 5) == [naive([39] * 9, 5)]


def test_seeds_give_the_same_tokens_alone_and_in_any_mix():
    prompts = ragged(10)
    samplings = [Sampling(temperature=1.5, top_k=index % 3 * 10, top_p=0.95, seed=index % 4) for index in range(10)]
    alone = [make_engine().generate([p], 12, s)[0] for p, s in zip(prompts, samplings, strict=True)]
    for options in ({}, {"num_blocks": 12, "max_batch_tokens": 7}, {"prefix_sharing": False, "max_sequences": 3}):
        assert make_engine(**options).generate(prompts, 12, samplings) == alone
    mixed = [*samplings[:5], *[Sampling()] * 5]
    outputs = make_engine().generate(prompts, 12, mixed)
    assert outputs[:5] == alone[:5]
    assert outputs[5:] == [naive(prompt, 12) for prompt in prompts[5:]]
    same = make_engine().generate([prompts[0]] * 2, 12, Sampling(temperature=1.5, seed=9))
    assert same[0] == same[1]
    fresh = make_engine().generate([prompts[0]] * 2, 12, Sampling(temperature=1.5))
    assert fresh[0] != fresh[1]


def test_stats_count_what_was_done():
    engine = make_engine(num_blocks=64)
    stream = engine.stream([[1] * 10, [2] * 6], 5)
    next(stream)
    stats = engine.stats()
    assert (stats.blocks_total, stats.blocks_used, stats.blocks_free) == (64, 5, 59)
    assert (stats.steps, stats.prefill_tokens, stats.decode_tokens) == (1, 16, 0)
    assert (stats.bytes_reserved, stats.bytes_peak_used) == (64 * 32, 5 * 32)
    assert stats.waste == pytest.approx(4 / 20)
    list(stream)
    stats = engine.stats()
    assert (stats.steps, stats.decode_tokens, stats.running) == (5, 8, 0)
    assert stats.blocks_shared == 0


def test_many_requests_pass_through_a_small_pool():
    engine = make_engine(num_blocks=12, max_sequences=4)
    prompts = ragged(300, prefix=4)
    assert engine.generate(prompts, 3) == [naive(prompt, 3) for prompt in prompts]
    check_idle(engine)


@pytest.mark.parametrize(
    ("prompts", "count", "sampling", "error", "message"),
    [
        ([], 4, Sampling(), InputError, "prompts is empty"),
        ([[]], 4, Sampling(), InputError, "empty"),
        ([1, 2], 4, Sampling(), InputError, "flat list"),
        ([[1, 2.5]], 4, Sampling(), InputError, "whole numbers"),
        ([[VOCABULARY]], 4, Sampling(), InputError, "ids are 0 to 39"),
        ([[1]], 0, Sampling(), InputError, "max_new_tokens=0"),
        ([[1]], 32, Sampling(), InputError, r"longest sequence is 32 \(learned positions\)"),
        ([[1], [1] * 20], 8, Sampling(), CapacityError, "needs 7 blocks of 4 tokens, and the pool has 6"),
        ([[1], [2]], 4, [Sampling()], InputError, "2 prompts and 1 samplings"),
        ([[1]], 4, Sampling(top_p=0), ConfigError, "top_p"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_input_is_refused_before_anything_is_computed(prompts, count, sampling, error, message, method):
    engine = make_engine(max_length=32, num_blocks=6)
    with pytest.raises(error, match=message):
        getattr(engine, method)(prompts, count, sampling)
    check_idle(engine)
    assert engine.module.steps == 0


def test_memory_for_less_than_a_block_is_refused():
    with pytest.raises(ConfigError, match="one block of 4 tokens takes 32 bytes"):
        make_engine(num_blocks=None, memory=31)


def test_the_engine_works_in_every_gradient_mode():
    expected = [naive([1, 2, 3], 4)]
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            engine = make_engine()
            assert engine.generate([[1, 2, 3]], 4) == expected
        assert engine.generate([[1, 2, 3]], 4) == expected
