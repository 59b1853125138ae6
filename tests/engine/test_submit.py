"""Requests one by one: waited for by threads, by asyncio tasks, or computed by a thread that serves."""

import asyncio
import gc
import random
import threading
import time

import pytest

from kvpass.errors import InputError, KvpassError
from kvpass.types import Sampling
from tests.history_engine import check_idle, make_engine, naive, ragged


def submit_all(engine, prompts, count):
    return [engine.submit(prompt, count) for prompt in prompts]


def run_threads(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_requests_come_in_while_others_run():
    engine = make_engine(num_blocks=24, max_sequences=5)
    prompts = ragged(9)
    handles, tokens = [engine.submit(prompts[0], 10)], []
    for token in handles[0]:
        tokens.append(token)
        if len(handles) < len(prompts):
            handles.append(engine.submit(prompts[len(handles)], 10))
    assert tokens == handles[0].tokens == list(handles[0])
    assert [handle.result() for handle in handles] == [naive(prompt, 10) for prompt in prompts]
    assert all(handle.done and handle.finish_reason == "length" for handle in handles)
    check_idle(engine)


def test_a_handle_shows_what_has_come():
    engine = make_engine()
    handle = engine.submit([1, 2, 3], 5)
    assert (handle.tokens, handle.done, handle.finish_reason) == ([], False, None)
    expected = naive([1, 2, 3], 5)
    for count, token in enumerate(handle, 1):
        assert token == expected[count - 1] and handle.tokens == expected[:count]
    assert (handle.tokens, handle.done, handle.finish_reason) == (expected, True, "length")
    stopped = engine.submit([1, 2, 3], 5, Sampling(stop_token_ids=(expected[0],)))
    assert (stopped.result(), stopped.finish_reason) == (expected[:1], "stop")


@pytest.mark.parametrize("served", [False, True])
def test_threads_wait_for_their_own_tokens_and_for_one_anothers(served):
    engine = make_engine(num_blocks=24, max_sequences=5)
    prompts = ragged(12)
    expected = [naive(prompt, 10) for prompt in prompts]
    shared = engine.submit([5, 6], 30)
    outputs: dict[int, list[int]] = {}

    def work(first):
        assert list(shared) == naive([5, 6], 30)
        for index in range(first, 12, 4):
            handle = engine.submit(prompts[index], 10)
            outputs[index] = list(handle) if index % 2 else handle.result()

    works = [lambda first=first: work(first) for first in range(4)]
    if served:
        with engine.serving():
            run_threads(*works)
    else:
        run_threads(*works)
    assert [outputs[index] for index in range(12)] == expected
    check_idle(engine)


@pytest.mark.parametrize("served", [False, True])
def test_asyncio_tasks_wait_while_their_loop_runs_on(served):
    engine = make_engine(num_blocks=24, max_sequences=5)
    prompts = ragged(12)
    engine.module.before_step = lambda step: time.sleep(0.002)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def one(index):
        await asyncio.sleep(0.002 * index)
        handle = engine.submit(prompts[index], 10)
        if index % 2:
            return await handle
        return [token async for token in handle]

    async def everything():
        ticking = asyncio.create_task(tick())
        try:
            return await asyncio.gather(*(one(index) for index in range(12)))
        finally:
            ticking.cancel()

    if served:
        with engine.serving():
            outputs = asyncio.run(everything())
    else:
        outputs = asyncio.run(everything())
    assert outputs == [naive(prompt, 10) for prompt in prompts]
    assert ticks > engine.module.steps, "the loop stood still while steps were computed"
    check_idle(engine)


def test_a_task_that_is_cancelled_leaves_the_request_to_others():
    engine = make_engine()
    handle = engine.submit([1, 2, 3], 20)
    engine.module.before_step = lambda step: time.sleep(0.002)

    async def main():
        waiting = asyncio.create_task(handle._result_async())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not handle.done
        return await handle

    assert asyncio.run(main()) == naive([1, 2, 3], 20)
    check_idle(engine)


def test_a_thread_serves_though_nobody_waits():
    engine = make_engine()
    threads = threading.active_count()
    with engine.serving(), engine.serving():
        assert threading.active_count() == threads + 1
        handle = engine.submit([1, 2, 3], 20)
        deadline = time.monotonic() + 10
        while not handle.done and time.monotonic() < deadline:
            time.sleep(0.001)
        assert handle.tokens == naive([1, 2, 3], 20)
    assert threading.active_count() == threads
    check_idle(engine)


def test_who_waits_goes_on_when_the_thread_stops():
    engine = make_engine(num_blocks=256)
    engine.module.before_step = lambda step: time.sleep(0.001)
    handle, results = engine.submit([1, 2, 3], 200), []
    waiting = threading.Thread(target=lambda: results.append(handle.result()))
    with engine.serving():
        waiting.start()
        while len(handle.tokens) < 10:
            time.sleep(0.001)
    waiting.join(timeout=30)
    assert results == [naive([1, 2, 3], 200)]
    check_idle(engine)


def test_the_figures_can_be_read_while_a_thread_computes_step_after_step():
    engine = make_engine(num_blocks=256)
    engine.module.before_step = lambda step: time.sleep(0.001)
    with engine.serving():
        handle = engine.submit([1, 2, 3], 400)
        for _ in range(20):
            before = engine.module.steps
            engine.stats()
            assert engine.module.steps - before <= 3, "others had to wait for more than the step under way"
        handle.cancel()
    check_idle(engine)


@pytest.mark.parametrize("served", [False, True])
def test_cancelling_gives_the_blocks_back_and_wakes_who_waits(served):
    engine = make_engine(num_blocks=256)
    engine.module.before_step = lambda step: time.sleep(0.001)
    handle, other, results = engine.submit([1, 2, 3], 400), engine.submit([4], 30), []

    def work():
        results.append(handle.result())

    def cancel():
        while len(handle.tokens) < 5:
            time.sleep(0.001)
        handle.cancel()

    if served:
        with engine.serving():
            run_threads(work, cancel)
    else:
        run_threads(work, cancel)
    assert handle.done and handle.finish_reason == "cancelled"
    assert 5 <= len(results[0]) < 100 and results[0] == naive([1, 2, 3], len(results[0]))
    assert list(handle) == results[0]
    handle.cancel()
    assert other.result() == naive([4], 30)
    check_idle(engine)


def test_a_handle_that_nobody_holds_is_cancelled():
    engine = make_engine()
    kept = engine.submit([1, 2], 10)
    dropped = iter(engine.submit([3, 4], 10))
    next(dropped)
    assert engine.stats().running == 2
    del dropped
    gc.collect()
    assert engine.stats().running == 1
    engine.submit([5, 6], 10)
    gc.collect()
    assert kept.result() == naive([1, 2], 10)
    check_idle(engine)


def test_a_handle_collected_in_the_middle_of_a_step_is_dropped_after_it():
    engine = make_engine()
    handles = [engine.submit([3, 4], 50)]
    engine.module.before_step = lambda step: handles.clear()
    assert engine.submit([1, 2], 5).result() == naive([1, 2], 5)
    check_idle(engine)


def test_waiting_ends_after_the_timeout_and_the_request_goes_on():
    engine = make_engine()
    engine.module.before_step = lambda step: time.sleep(0.005)
    handle = engine.submit([1, 2], 20)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    with engine.serving(), pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    assert handle.result(timeout=30) == naive([1, 2], 20)
    check_idle(engine)


def test_a_step_that_raises_reaches_who_computes_it_and_can_be_tried_again():
    engine = make_engine()
    handle, other = engine.submit([1, 2, 3], 8), engine.submit([4, 5], 8)

    def fail(step):
        if engine.module.steps == 3:
            raise MemoryError("no room")

    engine.module.before_step = fail
    with pytest.raises(MemoryError):
        handle.result()
    engine.check_integrity()
    assert not handle.done and handle.tokens == naive([1, 2, 3], 2)
    assert handle.result() == naive([1, 2, 3], 8)
    assert other.result() == naive([4, 5], 8)
    check_idle(engine)


@pytest.mark.parametrize("how", ["thread", "asyncio"])
def test_a_step_that_raises_where_nobody_waits_fails_the_requests_in_it(how):
    engine = make_engine(max_sequences=2)

    def fail(step):
        if engine.module.steps == 3:
            raise RuntimeError("no luck")

    engine.module.before_step = fail
    prompts = ragged(3)
    handles = submit_all(engine, prompts, 8)
    failures = []

    async def outcomes():
        return await asyncio.gather(*(handle._result_async() for handle in handles), return_exceptions=True)

    if how == "asyncio":
        failures = asyncio.run(outcomes())
    else:
        with engine.serving():
            for handle in handles:
                try:
                    failures.append(handle.result())
                except KvpassError as error:
                    failures.append(error)
    for handle, failure, prompt in zip(handles[:2], failures[:2], prompts[:2], strict=True):
        assert isinstance(failure, KvpassError) and "no luck" in str(failure)
        assert isinstance(failure.__cause__, RuntimeError)
        assert handle.finish_reason == "error" and handle.tokens == naive(prompt, 2)
        with pytest.raises(KvpassError, match="no luck"):
            list(handle)
    assert failures[2] == naive(prompts[2], 8)
    check_idle(engine)


def test_logits_that_are_not_finite_fail_their_own_request_only():
    engine = make_engine()
    engine.module.poison = 39
    good, bad = engine.submit([1, 2, 3], 12), engine.submit([39] * 9, 5)
    with pytest.raises(KvpassError, match="NaN or infinity"):
        bad.result()
    assert good.result() == naive([1, 2, 3], 12)
    check_idle(engine)


def test_samples_share_the_prompt_and_have_seeds_of_their_own():
    engine = make_engine(num_blocks=128)
    prompt = list(range(33))
    handle = engine.submit(prompt, 12, Sampling(temperature=1.5, seed=7), n=4)
    outputs = [sample.result() for sample in handle.samples]
    assert outputs[0] == engine.generate([prompt], 12, Sampling(temperature=1.5, seed=7))[0]
    assert len({tuple(output) for output in outputs}) == 4
    assert engine.stats().prefill_tokens < 2 * len(prompt)
    again = engine.submit(prompt, 12, Sampling(temperature=1.5, seed=7), n=4)
    assert [sample.result() for sample in again.samples] == outputs
    neighbour = engine.submit(prompt, 12, Sampling(temperature=1.5, seed=8), n=4)
    assert not {tuple(sample.result()) for sample in neighbour.samples} & {tuple(output) for output in outputs}
    cancelled = engine.submit(prompt, 12, n=3)
    cancelled.cancel()
    assert [sample.finish_reason for sample in cancelled.samples] == ["cancelled"] * 3
    check_idle(engine)


def test_an_engine_that_is_closed_leaves_nothing_behind():
    engine = make_engine(num_blocks=256)
    threads = threading.active_count()
    engine.module.before_step = lambda step: time.sleep(0.001)
    handles, results = submit_all(engine, ragged(5), 200), []
    stream = engine.stream(ragged(2), 50)
    next(stream)
    serving = engine.serving()
    serving.__enter__()
    waiting = threading.Thread(target=lambda: results.append(handles[0].result()))
    waiting.start()
    with engine:
        while not handles[0].tokens:
            time.sleep(0.001)
    waiting.join(timeout=30)
    assert results == [handles[0].tokens]
    assert all(handle.finish_reason == "cancelled" for handle in handles)
    list(stream)
    serving.__exit__(None, None, None)
    assert threading.active_count() == threads
    assert not engine.caches
    check_idle(engine)
    for call in (lambda: engine.submit([1], 1), lambda: engine.generate([[1]], 1), engine.serving):
        with pytest.raises(InputError, match="closed"):
            call()
    engine.close()


def test_a_step_cannot_wait_for_itself():
    engine = make_engine()
    handle, errors = engine.submit([1, 2], 3), []

    def wait(step):
        for call in (handle.result, engine.stats, lambda: engine.generate([[1]], 1)):
            try:
                call()
            except InputError as error:
                errors.append(str(error))

    engine.module.before_step = wait
    assert handle.result() == naive([1, 2], 3)
    assert len(errors) == 9 and all("its own steps" in error for error in errors)
    check_idle(engine)


def test_threads_and_tasks_that_come_and_go_get_their_own_tokens():
    engine = make_engine(num_blocks=24, max_sequences=4)
    prompts = ragged(40)
    expected = [naive(prompt, 6) for prompt in prompts]
    outputs: dict[int, list[int]] = {}

    def thread(first):
        numbers = random.Random(first)
        for index in range(first, 40, 4):
            handle = engine.submit(prompts[index], 6)
            if numbers.random() < 0.3:
                next(iter(handle))
                handle.cancel()
                handle = engine.submit(prompts[index], 6)
            outputs[index] = handle.result()

    def loop(first):
        async def one(index):
            outputs[index] = await engine.submit(prompts[index], 6)

        async def everything():
            await asyncio.gather(*(one(index) for index in range(first, 40, 4)))

        asyncio.run(everything())

    def serve():
        for _ in range(5):
            with engine.serving():
                time.sleep(0.003)
            time.sleep(0.003)

    run_threads(*(lambda f=f: thread(f) for f in (0, 1)), *(lambda f=f: loop(f) for f in (2, 3)), serve)
    assert [outputs[index] for index in range(40)] == expected
    check_idle(engine)
