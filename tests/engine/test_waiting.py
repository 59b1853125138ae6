"""Whoever waits is told when nobody can ever bring what is waited for."""

import asyncio
import os

import pytest

import kvpass
from kvpass.types import Sampling
from tests.history_engine import check_idle, make_engine, naive
from tests.speculating import always_speculate

PATIENCE = 20  # seconds, where a fault would wait for ever


@pytest.mark.parametrize("served", [False, True])
def test_a_callback_that_waits_for_its_own_engine_fails_alone(served):
    engine = make_engine()

    def waits(tokens):
        return engine.submit([1], 1).result(timeout=PATIENCE)

    def both():
        calls = engine.submit([1, 2, 3], 4, Sampling(allowed_tokens=waits))
        other = engine.submit([4, 5], 4)
        with pytest.raises(kvpass.KvpassError, match="called from within one of its own steps"):
            calls.result(timeout=PATIENCE)
        assert other.result(timeout=PATIENCE) == naive([4, 5], 4)

    if served:
        with engine.serving():
            both()
    else:
        both()
    while engine.step():
        pass
    check_idle(engine)


class Broken(Exception):
    pass


def broken_flush(engine, monkeypatch):
    def flush():
        raise Broken("no room on the disk")

    monkeypatch.setattr(engine._moves, "flush", flush)


def test_a_fault_between_steps_ends_what_the_serving_thread_was_asked_for(monkeypatch):
    engine = make_engine()
    with engine.serving():
        assert engine.submit([1, 2], 3).result(timeout=PATIENCE) == naive([1, 2], 3)
        handle = engine.submit([1, 2, 3], 200, Sampling(ignore_eos=True))
        next(iter(handle))
        with monkeypatch.context() as broken:
            broken_flush(engine, broken)
            with pytest.raises(kvpass.KvpassError, match="no room on the disk"):
                handle.result(timeout=PATIENCE)
        assert engine.submit([1, 2], 3).result(timeout=PATIENCE) == naive([1, 2], 3)
    check_idle(engine)


def test_a_fault_between_steps_reaches_tasks(monkeypatch):
    engine = make_engine()

    async def one():
        handle = engine.submit([1, 2, 3], 200, Sampling(ignore_eos=True))
        async for _ in handle:
            broken_flush(engine, monkeypatch)

    async def patiently():
        await asyncio.wait_for(one(), PATIENCE)

    with pytest.raises(kvpass.KvpassError, match="no room on the disk"):
        asyncio.run(patiently())
    monkeypatch.undo()
    check_idle(engine)


def test_a_forked_process_is_told_that_nobody_serves_there(monkeypatch):
    engine = make_engine()
    with engine.serving():
        real = os.getpid()
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: real + 1)
            with pytest.raises(kvpass.InputError, match="was forked from one in which a thread serves"):
                engine.submit([1, 2], 100).result(timeout=PATIENCE)
    while engine.step():
        pass
    check_idle(engine)


def test_a_drafter_that_fails_to_forget_keeps_nobody_waiting():
    class Forgetless(kvpass.PromptLookup):
        def forget(self, sequence):
            raise Broken("forget")

    engine = always_speculate(make_engine(), Forgetless())
    with pytest.warns(kvpass.KvpassWarning, match="failed to forget a request"):
        assert engine.submit([1, 2, 3], 6).result(timeout=PATIENCE) == naive([1, 2, 3], 6)
    check_idle(engine)


def test_samples_have_a_bound():
    engine = make_engine()
    with pytest.raises(kvpass.InputError, match="more than 4096"):
        engine.submit([1, 2], 3, n=100_000)
    check_idle(engine)
