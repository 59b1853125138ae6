"""Rows of tokens whose next token somebody else chooses: whatever they are, the logits are those of their content."""

import random
import threading

import numpy as np
import pytest

import kvpass
from kvpass.engine.row_session import RowSession
from tests.history_engine import VOCABULARY, check_idle, logits_of, make_engine, naive


def right(session, rows):
    found = session.logits(rows)
    return all(np.array_equal(found[i].numpy(), logits_of(row)) for i, row in enumerate(rows))


def grown(rows, numbers):
    return [(*row, numbers.randrange(VOCABULARY)) for row in rows]


def test_a_loop_computes_only_what_is_new():
    engine = make_engine()
    row = (3, 1, 4, 1, 5)
    with RowSession(engine, 40) as session:
        for _ in range(20):
            row = (*row, int(session.logits([row])[0].argmax()))
    assert list(row[5:]) == naive([3, 1, 4, 1, 5], 20)
    assert engine.stats().prefill_tokens + engine.stats().decode_tokens == 5 + 19
    check_idle(engine)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 24}, {"num_blocks": 16, "max_sequences": 2}])
def test_rows_part_come_back_and_change_at_will(options):
    numbers = random.Random(len(options))
    engine = make_engine(**options)
    with RowSession(engine, 60) as session:
        rows = [(1, 2, 3), (1, 2, 3, 4, 5), (7,)]
        before = rows
        for turn in range(60):
            assert right(session, rows), f"turn {turn}"
            engine.check_integrity()
            kind = numbers.randrange(7)
            if kind == 0:
                rows = [numbers.choice(rows) for _ in range(numbers.randint(1, 4))]  # parted, left out, equal
            elif kind == 1:
                rows = before  # back to earlier ones
            elif kind == 2:
                rows = [tuple(numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, 30)))]
            elif kind == 3:
                rows = [row[: numbers.randint(1, len(row))] for row in rows]
            before, rows = rows, grown([row[:55] for row in rows], numbers) if kind else rows
    check_idle(engine)


def test_rows_share_what_they_began_with():
    engine = make_engine()
    prompt = tuple(range(20))
    with RowSession(engine, 40) as session:
        session.logits([prompt])
        computed = engine.stats().prefill_tokens
        assert right(session, [(*prompt, token) for token in range(4)])
        assert engine.stats().prefill_tokens == computed and engine.stats().decode_tokens == 4
        assert engine.stats().blocks_shared >= 4
    check_idle(engine)


@pytest.mark.parametrize("served", [False, True])
def test_several_threads_beside_requests(served):
    engine = make_engine(num_blocks=80, max_sequences=6)
    faults = []

    def work(seed):
        numbers = random.Random(seed)
        with RowSession(engine, 40) as session:
            rows = [(seed, 2), (seed, 3, 4)]
            for _ in range(15):
                if not right(session, rows):
                    faults.append(seed)
                rows = grown(rows, numbers)

    def everything():
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        handle = engine.submit([1, 2, 3], 30)
        for thread in threads:
            thread.start()
        assert handle.result(timeout=30) == naive([1, 2, 3], 30)
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()

    if served:
        with engine.serving():
            everything()
    else:
        everything()
    assert not faults
    check_idle(engine)


def test_what_cannot_be_used_changes_nothing():
    engine = make_engine(num_blocks=8, max_length=20)
    with RowSession(engine, 20) as session:
        assert right(session, [(1, 2)])
        for rows, why in (
            ([], "no rows"),
            ([()], "empty"),
            ([(1, 99)], "ids are 0 to 39"),
            ([(99, 1)], "ids are 0 to 39"),
            ([tuple(range(21))], "longest may have 20"),
        ):
            with pytest.raises(kvpass.InputError, match=why):
                session.logits(rows)
        assert right(session, [(1, 2, 3)])
        assert engine.stats().prefill_tokens + engine.stats().decode_tokens == 3
    with pytest.raises(kvpass.InputError, match="the longest sequence is 20"):
        RowSession(engine, 21)
    with RowSession(make_engine(num_blocks=2), 30) as session, pytest.raises(kvpass.CapacityError):
        session.logits([tuple(range(12))])
    check_idle(engine)


def test_an_error_in_a_step_gives_everything_back():
    engine = make_engine()
    with RowSession(engine, 20) as session:
        session.logits([(1, 2)])

        def fails(step):
            raise MemoryError("full")

        engine.module.before_step = fails
        with pytest.raises(MemoryError):
            session.logits([(1, 2, 3)])
        engine.module.before_step = lambda step: None
        assert right(session, [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3)])
        engine.module.poison = 9
        with pytest.raises(kvpass.KvpassError, match="NaN or infinity"):
            session.logits([(9, 1)])
        assert right(session, [(8, 1), (8, 2)])
    check_idle(engine)


def test_the_engine_is_closed_meanwhile():
    engine = make_engine()
    session = RowSession(engine, 20)
    session.logits([(1, 2)])
    engine.close()
    with pytest.raises(kvpass.InputError, match="was closed"):
        session.logits([(1, 2, 3)])


@pytest.mark.parametrize("options", [{}, {"num_blocks": 24}, {"num_blocks": 16, "max_sequences": 2}])
def test_the_logits_of_any_tokens_of_rows(options):
    numbers = random.Random(7)
    engine = make_engine(**options, max_batch_tokens=9)
    with RowSession(engine, 60) as session:
        rows = [(1, 2, 3), (1, 2, 3, 4, 5), (7,)]
        for turn in range(80):
            firsts = [numbers.randrange(len(row)) if turn % 3 else len(row) - 1 for row in rows]
            kept = [rows[0]] if turn % 2 else []
            found = session.logits_from(rows, firsts, kept)
            for row, first, logits in zip(rows, firsts, found, strict=True):
                wanted = [logits_of(row[: end + 1]) for end in range(first, len(row))]
                assert np.array_equal(logits.numpy(), np.stack(wanted)), f"turn {turn}: {row} from {first}"
            engine.check_integrity()
            if turn % 5 == 4:
                rows = [row[: numbers.randint(1, len(row))] for row in rows[: numbers.randint(1, 3)]]
            for _ in range(numbers.randint(1, 4) if turn % 4 else 1):
                rows = grown([row[:50] for row in rows], numbers)
    check_idle(engine)


def test_a_kept_row_goes_on_where_it_stood():
    engine = make_engine()
    with RowSession(engine, 60) as session:
        session.logits([(1, 2, 3, 4, 5), (6, 7, 8)])
        session.logits_from([(1, 2, 3, 4, 5, 6)], [5], kept=[(6, 7, 8)])
        before = engine.stats().prefill_tokens
        assert right(session, [(6, 7, 8, 9)])
        assert engine.stats().prefill_tokens == before
    check_idle(engine)
