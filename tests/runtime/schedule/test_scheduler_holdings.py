"""What sequences hold: groups with windows, forks and copies, prefixes inside a block, swaps."""

import pytest

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.sequences.sequence import SequenceState


def closed_form(windows, computed, size):
    """Blocks with a token that a token to come can see, and those begun."""
    whole = -(-computed // size)
    return sum(whole - (0 if w is None else max(0, computed - w + 1) // size) for w in windows)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("windows", [(None, 6), (3, None, 9), (5, 5)])
def test_groups_hold_what_their_windows_see_also_in_prefill(make_machine, windows, sharing):
    machine = make_machine(num_blocks=60, windows=windows, sharing=sharing, max_batch_tokens=8)
    sequence = machine.add(list(range(5)) * 7, max_new_tokens=20)
    while machine.step().ranges and sequence.state is SequenceState.RUNNING:
        assert machine.pool.num_used == closed_form(windows, sequence.num_computed, 4)
        assert [table.num_passed > 0 for table in sequence.tables] == [
            w is not None and sequence.num_computed - w + 1 >= 4 for w in windows
        ]
        machine.scheduler.check_integrity()
    assert len(sequence.output) == 20
    machine.check_outputs()
    machine.check_empty()


def test_a_prompt_longer_than_the_pool_passes_through_a_window(make_machine):
    machine = make_machine(num_blocks=5, windows=(6,), max_batch_tokens=100)
    machine.add([1, 2, 3] * 30, 10)
    machine.run()
    assert machine.pool.peak_used == 5
    machine.check_outputs()
    machine.check_empty()
    with pytest.raises(CapacityError, match="needs 3 blocks of 4 tokens, and the pool has 2"):
        make_machine(num_blocks=2, windows=(6,)).add([1] * 40)


def test_a_prompt_takes_its_blocks_as_it_is_computed(make_machine):
    machine = make_machine(num_blocks=20, max_batch_tokens=8, sharing=False)
    sequence = machine.add([1] * 40, 4)
    for step in range(1, 6):
        machine.step()
        assert len(sequence.tables[0].owned) == 2 * step
    machine.run()
    machine.check_outputs()


def test_forks_share_all_blocks_and_copy_the_last_one_when_they_write(make_machine):
    machine = make_machine(num_blocks=40, max_batch_tokens=40, windows=(None, 6))
    parent = machine.add([1, 2, 3, 4, 0, 1, 2, 3, 4, 0], 9)
    machine.step()
    used = machine.pool.num_used
    twins = machine.fork(parent, 3)
    machine.scheduler.check_integrity()
    assert machine.pool.num_used == used
    assert all(t.tables[g].owned == parent.tables[g].owned for t in twins for g in range(2))
    step = machine.step()
    # Three of four copy the block of the ninth and tenth token in each group; the last writes where it is.
    assert len(step.copies) == 3 * 2 and len({source for source, _ in step.copies}) == 2
    assert machine.pool.num_used == used + 3 * 2
    machine.run()
    machine.check_outputs()
    assert all(len(twin.output) == 9 for twin in twins)
    machine.check_empty()


def test_forks_at_the_end_of_a_block_copy_nothing(make_machine):
    machine = make_machine(num_blocks=40, max_batch_tokens=40)
    parent = machine.add([1] * 8, 9)
    machine.step()
    machine.fork(parent, 2)
    assert machine.step().copies == ()
    machine.run()
    machine.check_outputs()


def test_forks_beyond_the_limit_wait_and_a_waiting_sequence_can_be_forked(make_machine):
    machine = make_machine(num_blocks=40, max_sequences=2, max_batch_tokens=40)
    parent, waiting = machine.add([1] * 9, 9), machine.add([2] * 9, 9)
    machine.step()
    twins = [*machine.fork(parent, 3), *machine.fork(waiting, 1)]
    machine.scheduler.check_integrity()
    assert [t.state for t in twins] == [SequenceState.WAITING] * 4
    machine.run()
    assert all(len(sequence.output) == 9 for sequence in twins)
    machine.check_outputs()
    machine.check_empty()
    with pytest.raises(IntegrityError, match="only what is queued"):
        machine.scheduler.fork(parent, [1])


def test_a_fork_may_go_on_with_another_token(make_machine):
    machine = make_machine(num_blocks=40)
    parent = machine.add([1] * 6, 9)
    machine.step()
    (twin,) = machine.scheduler.fork(parent, [1])
    other = (parent.output[0] + 1) % 5
    twin.replace_newest(other)
    machine.run()
    assert twin.output[0] == other and len(twin.output) == 9 and len(parent.output) == 9
    again = make_machine()
    alone = again.add([1] * 6 + [other], 8)
    again.run()
    assert twin.output[1:] == alone.output
    machine.check_outputs()


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
def test_a_prefix_that_ends_inside_a_block_is_copied(make_machine, windows):
    machine = make_machine(num_blocks=40, block_size=32, max_batch_tokens=100, windows=windows)
    prompt = [i * i % 5 for i in range(50)]
    machine.add([*prompt, *[1] * 14], 2)
    machine.run()
    second = machine.add([*prompt, 4, 4, 4], 3)
    step = machine.step()
    ((_, start, end),) = step.ranges
    assert (start, end) == (50, 53)
    assert len(step.copies) == len(windows)
    assert machine.scheduler.counts.prefix_hit_tokens == 50
    machine.run()
    assert len(second.output) == 3
    machine.check_outputs()
    machine.check_empty()


@pytest.mark.parametrize("max_batch_tokens", [4096, 512, 100])
def test_a_prefix_of_many_requests_is_computed_and_stored_once(make_machine, max_batch_tokens):
    machine = make_machine(
        num_blocks=200, block_size=16, max_batch_tokens=max_batch_tokens, max_sequences=32, windows=(None,)
    )
    prefix = [i * i % 5 for i in range(1024)]
    for number in range(32):
        machine.add([*prefix, *[number % 5, number // 5 % 5, number // 25] * 2], 3)
    most = 0
    while machine.step().ranges:
        most = max(most, machine.pool.num_used)
    assert machine.scheduler.counts.prefill_tokens == 1024 + 32 * 6
    assert most <= 1024 // 16 + 32
    machine.check_outputs()
    machine.check_empty()


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_what_is_preempted_is_swapped_out_and_not_computed_again(make_machine, windows, sharing):
    counts = {}
    for host_blocks in (0, 100):
        machine = make_machine(
            num_blocks=9 * len(windows),
            windows=windows,
            sharing=sharing,
            max_batch_tokens=100,
            host_blocks=host_blocks,
            max_sequences=20,
        )
        for token in range(6):
            machine.add([token % 5, token // 5] * 3, 20)
        machine.run()
        machine.check_outputs()
        machine.check_empty()
        counts[host_blocks] = machine.scheduler.counts
    assert counts[0].preemptions and counts[100].preemptions and counts[0].restored_tokens == 0
    assert counts[100].restored_tokens > 0
    assert counts[100].prefill_tokens < counts[0].prefill_tokens


def test_what_was_swapped_out_and_lost_is_computed_again(make_machine):
    machine = make_machine(num_blocks=9, max_batch_tokens=100, host_blocks=100)
    machine.host.lost = True
    for token in range(6):
        machine.add([token % 5, token // 5] * 3, 20)
    machine.run()
    assert machine.scheduler.counts.preemptions and machine.scheduler.counts.restored_tokens == 0
    machine.check_outputs()
    machine.check_empty()


def test_a_pin_gives_way_when_nothing_could_run_beside_it(make_machine):
    machine = make_machine(num_blocks=6, max_batch_tokens=40)
    first = machine.add([1, 2, 3, 4, 1, 2, 3, 4, 0], 2)
    machine.run()
    machine.prefix.pin(first.tokens[:8], None)
    machine.add([2] * 15, 2)
    machine.run()
    assert len(machine.prefix.pins) == 1
    large = machine.add([3] * 18, 4)
    machine.run()
    assert len(large.output) == 4 and len(machine.prefix.pins) == 0
    machine.check_outputs()
    machine.check_empty()


def test_what_is_held_goes_on_once_it_is_extended(make_machine):
    machine = make_machine(num_blocks=4, block_size=4, sharing=False)
    held, other = machine.add([1, 2, 3], 9), machine.add([2] * 4, 9)
    step = machine.scheduler.schedule()
    machine.compute(step)
    machine.scheduler.commit(step, [[], *machine.next_tokens(step)[1:]])
    machine.scheduler.check_integrity()
    while other.state is not SequenceState.FINISHED:
        assert held not in [sequence for sequence, _, _ in machine.step().ranges]
        machine.scheduler.check_integrity()
    assert held.state is SequenceState.RUNNING and held.output == []
    with pytest.raises(IntegrityError, match="only what is held"):
        machine.scheduler.extend(other, 1)
    machine.scheduler.extend(held, machine.sequences[0][1][0])
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_what_is_held_makes_room_where_nobody_else_can_run(make_machine):
    machine = make_machine(num_blocks=3, block_size=4, sharing=False, host_blocks=3)
    held, other = machine.add([1] * 7, 5), machine.add([2] * 6, 5)
    step = machine.scheduler.schedule()
    machine.compute(step)
    assert step.sampled == (held,)
    machine.scheduler.commit(step, [[]])
    assert [sequence for sequence, _, _ in machine.step().ranges] == [other]
    machine.scheduler.check_integrity()
    assert held.state is SequenceState.WAITING and machine.scheduler.num_waiting == 1
    machine.run()
    assert len(other.output) == 5 and held.output == []
    machine.scheduler.extend(held, machine.sequences[0][1][0])
    machine.run()
    assert len(held.output) == 5
    machine.check_outputs()
    machine.check_empty()


def test_what_a_step_copies_for_who_is_not_computed_in_it_stays_theirs_until_it_ends(make_machine):
    machine = make_machine(block_size=8, num_blocks=20, max_batch_tokens=16)
    known = [0, 1, 2, 3, 4] * 3
    machine.add(known, 2)
    machine.run()
    machine.add([1] * 15, 4)
    beside = machine.add([*known[:13], 3, 3, 3, 3, 3, 3], 4)
    step = machine.scheduler.schedule()
    ((_, target),) = step.copies
    assert beside not in [sequence for sequence, _, _ in step.ranges]  # what is left of the step ends no block
    machine.scheduler.cancel([beside])
    assert machine.pool.count_owners(target) == 1
    machine.scheduler.check_integrity()
    machine.compute(step)
    machine.scheduler.commit(step, machine.next_tokens(step))
    assert machine.pool.count_owners(target) == 0
    machine.run()
    machine.check_empty()
