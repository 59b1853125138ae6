"""Wrong types, sizes and times in every public call: a clear error, and the pool as it was."""

import pytest

from kvpass.errors import CapacityError, ConfigError, InputError
from kvpass.types import Sampling
from tests.history_engine import VOCABULARY, check_idle, make_engine, naive

BAD_CALLS = [
    (lambda e, h: e.submit("text", 4), InputError, "text"),
    (lambda e, h: e.submit([], 4), InputError, "empty"),
    (lambda e, h: e.submit(5, 4), InputError, "int"),
    (lambda e, h: e.submit([[1, 2]], 4), InputError, "one prompt"),
    (lambda e, h: e.submit([1, None], 4), InputError, "whole numbers"),
    (lambda e, h: e.submit([1, True], 4), InputError, "whole numbers"),
    (lambda e, h: e.submit([VOCABULARY], 4), InputError, "ids are 0 to 39"),
    (lambda e, h: e.submit([-1], 4), InputError, "ids are 0 to 39"),
    (lambda e, h: e.submit([1], 0), InputError, "max_new_tokens=0"),
    (lambda e, h: e.submit([1], 2.5), InputError, "max_new_tokens=2.5"),
    (lambda e, h: e.submit([1], None), InputError, "max_new_tokens=None"),
    (lambda e, h: e.submit([1], 31), InputError, "longest sequence is 31"),
    (lambda e, h: e.submit([1] * 20, 8), CapacityError, "the pool has 6"),
    (lambda e, h: e.submit([1], 4, "greedy"), ConfigError, "no kvpass.Sampling"),
    (lambda e, h: e.submit([1], 4, [Sampling()]), ConfigError, "no kvpass.Sampling"),
    (lambda e, h: e.submit([1], 4, Sampling(temperature=-1)), ConfigError, "temperature"),
    (lambda e, h: e.submit([1], 4, Sampling(seed="x")), ConfigError, "seed"),
    (lambda e, h: e.submit([1], 4, n=0), InputError, "n=0"),
    (lambda e, h: e.submit([1], 4, n=True), InputError, "n=True"),
    (lambda e, h: e.submit([1], 4, n=1.0), InputError, "n=1.0"),
    (lambda e, h: e.submit([1], 4, priority=1.5), InputError, "priority=1.5"),
    (lambda e, h: e.submit([1], 4, priority=101), InputError, "priority=101"),
    (lambda e, h: e.submit([1], 4, priority="high"), InputError, "priority='high'"),
    (lambda e, h: e.submit([1], 4, deadline=0), InputError, "deadline=0"),
    (lambda e, h: e.submit([1], 4, deadline=-1.0), InputError, "deadline=-1.0"),
    (lambda e, h: e.submit([1], 4, deadline=float("nan")), InputError, "deadline=nan"),
    (lambda e, h: e.submit([1], 4, deadline="soon"), InputError, "deadline='soon'"),
    (lambda e, h: e.submit([1], 4, namespace=None), InputError, "namespace=None"),
    (lambda e, h: e.submit([1], 4, tenant=3), InputError, "tenant=3"),
    (lambda e, h: e.speculate("lookup"), ConfigError, "no drafter"),
    (lambda e, h: e.generate([[1]], 4, on_token=3), InputError, "on_token=3"),
    (lambda e, h: e.generate(None, 4), InputError, "NoneType"),
    (lambda e, h: e.generate([[1]], "4"), InputError, "max_new_tokens='4'"),
    (lambda e, h: e.stream([[1], "x"], 4), InputError, "is text"),
    (lambda e, h: e.stream({1: 2}, 4), InputError, "dict"),
    (lambda e, h: h.result(timeout="1"), InputError, "timeout='1'"),
    (lambda e, h: h.result(timeout=-1), InputError, "timeout=-1"),
    (lambda e, h: h.result(timeout=float("nan")), InputError, "timeout=nan"),
    (lambda e, h: h.result(timeout=True), InputError, "timeout=True"),
]


def test_bad_calls_are_refused_and_leave_the_pool_intact():
    engine = make_engine(max_length=31, num_blocks=6)
    handle = engine.submit([1, 2, 3], 8)
    next(iter(handle))
    for call, error, message in BAD_CALLS:
        with pytest.raises(error, match=message):
            call(engine, handle)
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (1, 0)
    assert handle.result() == naive([1, 2, 3], 8)
    check_idle(engine)
