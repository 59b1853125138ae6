"""Deadlines, priorities and namespaces of requests."""

import time

from tests.history_engine import check_idle, make_engine, naive


def test_a_request_ends_at_its_deadline_with_what_has_come():
    engine = make_engine(num_blocks=256)
    engine.module.before_step = lambda step: time.sleep(0.002)
    late, other = engine.submit([1, 2, 3], 400, deadline=0.1), engine.submit([4, 5], 20, deadline=60)
    tokens = late.result()
    assert late.finish_reason == "deadline" and tokens == naive([1, 2, 3], 400)[: len(tokens)]
    assert len(tokens) < 400
    assert other.result() == naive([4, 5], 20) and other.finish_reason == "length"
    queued = [engine.submit([index], 100, deadline=0.01) for index in range(3)]
    time.sleep(0.02)
    with engine.serving():
        assert [handle.result(timeout=30) for handle in queued] == [[], [], []]
    check_idle(engine)


def test_a_higher_priority_is_served_first():
    engine = make_engine(max_sequences=1)
    order = []
    handles = [engine.submit([index + 1], 5, priority=index) for index in range(3)]
    engine.module.before_step = lambda step: order.append(int(step.token_ids[0])) if step.positions[0] == 0 else None
    assert [handle.result() for handle in handles] == [naive([index + 1], 5) for index in range(3)]
    assert order == [3, 2, 1]
    check_idle(engine)


def test_a_namespace_does_not_see_the_blocks_of_another():
    engine = make_engine()
    prompt = list(range(20))
    for namespace in ("one", "two", ""):
        before = engine.stats().prefix_hit_tokens
        assert engine.submit(prompt, 4, namespace=namespace).result() == naive(prompt, 4)
        assert engine.stats().prefix_hit_tokens == before
    assert engine.submit(prompt, 4, namespace="one").result() == naive(prompt, 4)
    assert engine.stats().prefix_hit_tokens > 0
    check_idle(engine)
