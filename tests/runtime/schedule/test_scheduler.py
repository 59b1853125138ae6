import random

import pytest

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.types import Sampling


def test_prefill_and_decode_share_a_step(make_machine):
    machine = make_machine(max_batch_tokens=6, sharing=False)
    first = machine.add([1] * 3)
    machine.step()
    second = machine.add([2] * 9, max_new_tokens=1)
    step = machine.step()
    assert [(s, start, end) for s, start, end in step.ranges] == [(first, 3, 4), (second, 0, 5)]
    assert step.sampled == (first,)
    step = machine.step()
    assert [(s, start, end) for s, start, end in step.ranges] == [(first, 4, 5), (second, 5, 9)]
    assert step.sampled == (first, second)
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_requests_that_arrive_together_share_their_prefix_in_the_same_step(make_machine):
    machine = make_machine(max_batch_tokens=100)
    prefix = [1, 2, 3, 4, 0, 1, 2, 3]
    for tail in ([1, 1], [2, 2], [3]):
        machine.add(prefix + tail)
    step = machine.step()
    assert [start for _, start, _ in step.ranges] == [0, 8, 8]
    assert machine.pool.num_shared == 2
    assert machine.scheduler.counts.prefix_hit_tokens == 16
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_one_token_of_a_prompt_is_always_computed_and_equal_blocks_become_one(make_machine):
    machine = make_machine(max_batch_tokens=100)
    prompt = [1, 2, 3, 4, 0, 1, 2, 3]
    first, second = machine.add(prompt, 6), machine.add(prompt, 6)
    step = machine.step()
    assert [start for _, start, _ in step.ranges] == [0, 4]
    assert first.tables[0].owned == second.tables[0].owned
    assert machine.pool.num_used == 2
    machine.scheduler.check_integrity()
    machine.run()
    machine.check_outputs()


def test_generated_tokens_are_reused(make_machine):
    machine = make_machine(num_blocks=32)
    first = machine.add([1, 2, 3], 14)
    machine.run()
    conversation = [1, 2, 3, *first.output, 4, 4]
    machine.add(conversation)
    assert machine.step().ranges[0][1] == 16
    machine.run()
    machine.check_outputs()


def test_without_sharing_nothing_is_shared(make_machine):
    machine = make_machine(sharing=False, max_batch_tokens=100)
    for _ in range(2):
        machine.add([1] * 9)
    machine.step()
    assert (machine.pool.num_shared, machine.scheduler.counts.prefix_hit_tokens) == (0, 0)
    machine.run()
    machine.check_outputs()
    assert machine.pool.num_free == machine.pool.num_blocks


def test_requests_beyond_the_limits_are_queued_in_order(make_machine):
    machine = make_machine(max_sequences=2)
    sequences = [machine.add([token] * 2, 3) for token in range(5)]
    order = []
    while (step := machine.step()).ranges:
        assert len(step.ranges) <= 2
        order += [sequence for sequence, _, _ in step.ranges if sequence not in order]
    assert order == sequences
    machine.check_outputs()


def test_every_sequence_that_decodes_gets_a_token_in_every_step(make_machine):
    machine = make_machine(num_blocks=64, max_batch_tokens=3, max_sequences=50)
    for token in range(5):
        machine.add([token] * 7, 10)
    while True:
        decoding = {s for s in machine.scheduler._queues.running if s.num_output}
        if not (step := machine.step()).ranges:
            break
        assert decoding <= {sequence for sequence, _, _ in step.ranges}
        assert machine.scheduler.num_running <= 3
    machine.check_outputs()


def test_the_youngest_is_preempted_and_its_output_is_the_same(make_machine):
    machine = make_machine(num_blocks=6, sharing=False, max_batch_tokens=100)
    oldest, youngest = machine.add([1] * 8, 12), machine.add([2] * 6, 10)
    preempted = []
    while (step := machine.step()).ranges:
        assert any(sequence is oldest for sequence, _, _ in step.ranges) or oldest.state is SequenceState.FINISHED
        if youngest.state is SequenceState.WAITING and youngest.num_output:
            preempted.append(youngest.num_output)
            assert not youngest.tables[0].owned and youngest.num_computed == 0
    assert preempted and machine.scheduler.counts.preemptions >= 1
    assert len(youngest.output) == 10
    machine.check_outputs()
    machine.check_empty()


def test_nothing_is_admitted_into_blocks_that_running_sequences_will_soon_need(make_machine):
    machine = make_machine(num_blocks=6, sharing=False, max_batch_tokens=100)
    machine.add([1] * 17, 7)
    machine.add([2] * 2, 3)
    machine.run()
    assert machine.scheduler.counts.preemptions == 0
    machine.check_outputs()


def test_a_pool_that_fits_one_request_serves_many(make_machine):
    machine = make_machine(num_blocks=3, max_batch_tokens=5)
    for token in range(40):
        machine.add([token % 5] * 7, 6)
    machine.run()
    assert all(len(sequence.output) == 6 for sequence, _ in machine.sequences)
    machine.check_outputs()
    machine.check_empty()


def test_a_request_that_never_fits_is_refused_with_the_numbers(make_machine):
    machine = make_machine(num_blocks=3, block_size=4)
    machine.add([1] * 7, 6)
    with pytest.raises(CapacityError, match=r"needs 4 blocks of 4 tokens, and the pool has 3: give the cache more"):
        machine.add([1] * 7, 7)
    assert machine.scheduler.num_waiting == 1
    machine.run()
    machine.check_empty()


def test_a_stop_token_frees_at_once(make_machine):
    machine = make_machine()
    sequence = machine.add([1, 2, 3], 50, stop_ids=(0, 1, 2))
    machine.run()
    assert sequence.finish_reason == "stop"
    machine.check_outputs()
    machine.check_empty()


def test_cancelled_sequences_give_everything_back_wherever_they_are(make_machine):
    machine = make_machine(max_batch_tokens=12, max_sequences=2)
    sequences = [machine.add([token] * 9, 20) for token in range(4)]
    machine.step()
    machine.scheduler.cancel([sequences[0], sequences[3]])
    machine.scheduler.check_integrity()
    assert (machine.scheduler.num_running, machine.scheduler.num_waiting) == (1, 1)
    assert sequences[0].finish_reason is None
    machine.scheduler.cancel(sequences)
    machine.scheduler.cancel(sequences)
    machine.check_empty()


def test_a_failed_step_registers_nothing_and_is_computed_again(make_machine):
    machine = make_machine(max_batch_tokens=100)
    machine.add([1, 2, 3, 4, 0, 0])
    machine.step()
    for tail in ([1, 1, 1, 1, 1], [1, 1, 1, 1, 2]):
        machine.add([1, 2, 3, 4, *tail])
    registered = machine.pool.kept_blocks()
    machine.scheduler.schedule()
    machine.scheduler.check_integrity()
    assert machine.pool.kept_blocks() > registered
    assert machine.scheduler.recover()
    assert not machine.scheduler.recover()
    machine.scheduler.check_integrity()
    assert machine.pool.kept_blocks() == registered
    assert (machine.pool.num_used, machine.scheduler.num_running, machine.scheduler.num_waiting) == (0, 0, 3)
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_a_failed_step_with_an_equal_block_leaves_the_registered_one(make_machine):
    machine = make_machine(max_batch_tokens=100)
    prompt = [1, 2, 3, 4, 0, 1, 2, 3]
    machine.add(prompt, 1)
    machine.run()
    machine.add(prompt, 1)
    machine.scheduler.schedule()
    assert machine.scheduler._registry.referenced_blocks
    machine.scheduler.check_integrity()
    machine.scheduler.recover()
    machine.scheduler.check_integrity()
    machine.run()
    machine.check_outputs()


@pytest.mark.parametrize("where", ["allocate", "release", "keep", "acquire"])
@pytest.mark.parametrize("nth", range(4))
def test_an_interrupt_while_blocks_change_hands_loses_blocks_but_no_tokens(make_machine, monkeypatch, where, nth):
    machine = make_machine(num_blocks=8, max_batch_tokens=7)
    for tail in range(4):
        machine.add([1, 2, 3, 4, 0, tail, 1, 1], 9)
    original, calls = getattr(machine.pool, where), iter(range(100))

    def interrupted(*arguments):
        result = original(*arguments)
        if next(calls) == nth:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(machine.pool, where, interrupted)
    hits = 0
    while True:
        try:
            if not machine.step().ranges:
                break
        except KeyboardInterrupt:
            hits += 1
            assert machine.scheduler.recover()
            assert machine.pool.num_free == machine.pool.num_blocks
        machine.scheduler.check_integrity()
    assert hits == 1
    assert all(len(sequence.output) == 9 for sequence, _ in machine.sequences)
    machine.check_outputs()


def test_a_sequence_in_error_takes_what_it_registered_out_of_the_cache(make_machine):
    machine = make_machine(max_batch_tokens=100)
    broken = machine.add([1, 2, 3, 4, 0])
    machine.add([1, 2, 3, 4, 1], 9)
    step = machine.scheduler.schedule()
    machine.compute(step)
    machine.scheduler.commit(step, [None, machine.next_tokens(step)[1]])
    machine.scheduler.check_integrity()
    assert broken.finish_reason == "error" and not broken.tables[0].owned
    assert machine.pool.kept_blocks() == set()
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_clearing_the_prefix_cache_disturbs_nobody(make_machine):
    machine = make_machine(num_blocks=32)
    machine.add([1] * 9, 12)
    machine.step()
    machine.scheduler.clear_prefix_cache()
    machine.add([1] * 9, 12)
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_a_step_in_flight_must_be_committed_first(make_machine):
    machine = make_machine()
    sequence = machine.add([1, 2])
    step = machine.scheduler.schedule()
    for operation in (
        machine.scheduler.schedule,
        machine.scheduler.clear_prefix_cache,
        lambda: machine.scheduler.fork(sequence, [1]),
        lambda: machine.scheduler.commit(step, []),
        lambda: machine.scheduler.commit(step, [[0], [0]]),
        lambda: machine.scheduler.extend(sequence, 0),
    ):
        with pytest.raises(IntegrityError):
            operation()
    machine.scheduler.commit(step, [[1]])
    with pytest.raises(IntegrityError):
        machine.scheduler.commit(step, [[1]])


def test_waste_is_below_four_percent_at_a_mean_length_of_1000():
    scheduler = Scheduler(BlockPool(4096, 32), None, max_batch_tokens=2048, max_sequences=32)
    numbers = random.Random(0)
    for _ in range(48):
        scheduler.add(Sequence([0] * numbers.randint(500, 1400), numbers.randint(1, 100), Sampling(), 0))
    while (step := scheduler.schedule()).ranges:
        scheduler.commit(step, [[0]] * len(step.sampled))
    assert 0 < scheduler.counts.unused_slots / scheduler.counts.allocated_slots < 0.04


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("window", [1, 4, 5, 8, 9])
def test_a_window_bounds_the_blocks_that_a_sequence_holds(make_machine, window, sharing):
    machine = make_machine(num_blocks=20, block_size=4, sharing=sharing, window=window, max_batch_tokens=8)
    sequence = machine.add(list(range(5)) * 3, max_new_tokens=60)
    machine.step()
    machine.step()
    while sequence.state.value == "running":
        # Seen are the newest `window` tokens, the one to come included, and no block without one of them is held.
        first = max(0, sequence.num_computed - window + 1)
        assert sequence.tables[0].num_passed == first // 4
        assert len(sequence.tables[0].owned) == machine.pool.num_used
        machine.step()
        machine.scheduler.check_integrity()
    machine.check_outputs()
    machine.check_empty()


def test_blocks_that_a_window_has_passed_let_others_in(make_machine):
    lengths = {}
    for window in (None, 4):
        machine = make_machine(num_blocks=12, block_size=4, sharing=False, window=window, max_sequences=4)
        for _ in range(4):
            machine.add([1, 2, 3], max_new_tokens=40)
        lengths[window] = machine.run()
        machine.check_outputs()
        assert (machine.scheduler.counts.preemptions > 0) == (window is None)
    assert lengths[4] < lengths[None]


@pytest.mark.parametrize("windows", [(None,), (6, None)])
def test_trees_of_proposed_tokens_change_no_output_and_what_is_right_is_moved(make_machine, windows):
    machine = make_machine(num_blocks=40, max_batch_tokens=64, windows=windows)
    for token in range(4):
        machine.add([1, 2, token], 40)
    while (step := machine.step()).ranges:
        for place, sequence in enumerate(step.sampled):
            machine.propose(sequence, 3, 1, wrong=1 + place % 2)
        machine.scheduler.check_integrity()
    machine.check_outputs()
    counts = machine.scheduler.counts
    assert machine.num_moved >= len(windows) * counts.accepted_tokens > 50 and counts.drafted_trees > 20


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize(("accepted", "rejected"), [(0, 3), (3, 0), (2, 2), (9, 1)])
def test_proposed_tokens_change_no_output_and_those_that_are_right_save_steps(
    make_machine, sharing, accepted, rejected
):
    machine = make_machine(num_blocks=40, sharing=sharing, max_batch_tokens=64)
    sequences = [machine.add([1, 2, token], 30) for token in range(4)]
    steps = 0
    while (step := machine.step()).ranges:
        steps += 1
        for sequence in step.sampled:
            machine.propose(sequence, accepted, rejected)
        machine.scheduler.check_integrity()
    machine.check_outputs()
    assert all(len(sequence.output) == 30 for sequence in sequences)
    assert steps == 1 + -(-29 // (1 + accepted))
    counts = machine.scheduler.counts
    assert counts.decode_tokens + counts.accepted_tokens == 4 * 29
    assert counts.drafted_tokens >= counts.accepted_tokens == 4 * (29 - (steps - 1))
    machine.check_empty()


def test_accepted_tokens_are_found_again(make_machine):
    machine = make_machine(num_blocks=40)
    first = machine.add([1, 2, 3], 14)
    machine.step()
    machine.propose(first, 12, 0)
    machine.step()
    assert first.finish_reason == "length"
    machine.add([1, 2, 3, *first.output, 4])
    assert machine.step().ranges[0][1] == 16


def test_nobody_is_preempted_for_proposed_tokens(make_machine):
    machine = make_machine(num_blocks=4, max_batch_tokens=5)
    first, second = machine.add([1] * 4, 8), machine.add([2] * 2, 3)
    machine.step()
    machine.step()
    for sequence in (first, second):
        machine.propose(sequence, 0, 9)
    step = machine.step()
    # Of five tokens one belongs to each; the first has three slots left, the pool no block.
    assert [(end - start) for _, start, end in step.ranges] == [4, 1]
    machine.run()
    assert machine.scheduler.counts.preemptions == 0
    machine.check_outputs()
