"""Who is served when: priorities, shares of tenants, deadlines, prompts of different lengths, overload."""

import pytest

from benchmarks.overload import LARGE, judge, make_requests, serve
from kvpass.runtime.schedule import waiting_queue
from kvpass.runtime.sequences.sequence import SequenceState


def started(machine):
    """Sequences in the order in which they start, each as it is found in a step for the first time."""
    order = []
    while (step := machine.step()).ranges:
        order += [sequence for sequence, _, _ in step.ranges if sequence not in order]
        machine.scheduler.check_integrity()
    return order


def test_a_higher_priority_is_served_first_and_equal_ones_by_arrival(make_machine):
    machine = make_machine(max_sequences=1)
    ranked = [machine.add([i] * 3, priority=priority) for i, priority in enumerate((0, 1, 0, 5, 1))]
    assert started(machine) == [ranked[i] for i in (3, 1, 4, 0, 2)]
    machine.check_outputs()


@pytest.mark.parametrize("host_blocks", [0, 40])
@pytest.mark.parametrize("max_sequences", [2, 8])
def test_a_higher_priority_displaces_running_sequences_only_if_it_has_to(make_machine, max_sequences, host_blocks):
    machine = make_machine(
        num_blocks=13, max_sequences=max_sequences, max_batch_tokens=40, host_blocks=host_blocks, sharing=False
    )
    low = [machine.add([i] * 17, 7) for i in range(2)]
    machine.step()
    assert {s.state for s in low} == {SequenceState.RUNNING}
    small = machine.add([2] * 2, 1, priority=1)
    machine.step()
    # There are blocks for it, but perhaps no place.
    assert machine.scheduler.counts.preemptions == (max_sequences == 2)
    large = machine.add([3] * 20, 4, priority=1)
    step = machine.step()
    assert large in [sequence for sequence, _, _ in step.ranges]
    assert low[1].state is SequenceState.WAITING
    assert machine.scheduler.counts.restored_tokens == 0
    machine.run()
    assert (machine.scheduler.counts.restored_tokens > 0) == (host_blocks > 0)
    assert small.num_output == 1 and all(len(s.output) == s.max_new_tokens for s in (*low, large))
    machine.check_outputs()
    machine.check_empty()


def test_a_low_priority_does_not_starve(make_machine, monkeypatch):
    monkeypatch.setattr(waiting_queue, "TOKENS_PER_PRIORITY", 60)
    machine = make_machine(max_sequences=1)
    machine.add([0] * 2, 4)
    low = machine.add([1] * 2, 4)
    others = 0
    while low.state is not SequenceState.FINISHED:
        machine.add([2] * 2, 4, priority=1)  # 6 tokens of work each
        others += 1
        for _ in range(4):
            machine.step()
    assert 8 <= others <= 13
    machine.run()
    machine.check_outputs()


def test_tenants_share_whoever_queues_more(make_machine):
    machine = make_machine(max_sequences=1)
    flood = [machine.add([0, 1], 2, tenant="flood") for _ in range(20)]
    for _ in range(6):
        machine.step()
    late = [machine.add([2, 3], 2, tenant="late") for _ in range(5)]
    order = started(machine)
    assert [s for s in order if s in flood] == [s for s in flood if s in order]
    # Once it is there, every second place is the late tenant's.
    places = [order.index(sequence) for sequence in late]
    assert places[-1] - places[0] <= 2 * len(late) and places[0] <= 2


def test_overload_ends_in_fair_order():
    requests = make_requests(400)
    ended, scheduler = serve(requests)
    found = judge(requests, ended)
    assert found["ended"] == 400 and found["in order within each tenant"]
    assert found["requests of each small tenant"] == 4
    assert 3 <= found["of the large one when those were done"] <= 8
    assert sum(request.tenant == LARGE for request in requests) == 360
    assert scheduler.num_running == scheduler.num_waiting == 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_ends_a_sequence_wherever_it_is(make_machine, waits):
    machine = make_machine(max_sequences=1 if waits else 4)
    first = machine.add([1] * 6, 12)
    timed = machine.add([2] * 6, 12, deadline=3.0)
    machine.step()
    machine.step()
    before = timed.num_output
    machine.now = 3.0
    step = machine.scheduler.schedule()
    assert step.expired == (timed,)
    assert (timed.state, timed.finish_reason) == (SequenceState.FINISHED, "deadline")
    machine.compute(step)
    machine.scheduler.commit(step, machine.next_tokens(step))
    assert timed.num_output == before and (before > 0) != waits
    machine.run()
    assert len(first.output) == 12
    machine.check_outputs()
    machine.check_empty()


def test_nothing_but_a_deadline_may_happen_in_a_step(make_machine):
    machine = make_machine()
    timed = machine.add([2] * 6, 12, deadline=1.0)
    machine.now = 2.0
    step = machine.scheduler.schedule()
    assert (step.ranges, step.expired) == ((), (timed,))
    machine.check_empty()


def test_a_short_prompt_need_not_wait_for_the_end_of_a_long_one(make_machine):
    machine = make_machine(num_blocks=64, max_batch_tokens=16)
    long, short = machine.add([1] * 100, 2), machine.add([2] * 6, 2)
    step = machine.step()
    assert [(s, end - start) for s, start, end in step.ranges] == [(long, 8), (short, 6)]
    assert step.sampled == (short,)
    machine.run()
    machine.check_outputs()


def test_two_long_prompts_are_computed_one_after_the_other(make_machine):
    machine = make_machine(num_blocks=64, max_batch_tokens=16)
    first, _ = machine.add([1] * 100, 2), machine.add([2] * 100, 2)
    assert [s for s, _, _ in machine.step().ranges] == [first]
    machine.run()
    machine.check_outputs()


def test_a_sequence_cancelled_in_flight_is_dropped_at_the_commit(make_machine):
    machine = make_machine(max_batch_tokens=40)
    gone, stays = machine.add([1] * 6), machine.add([2] * 6)
    step = machine.scheduler.schedule()
    machine.scheduler.cancel([gone])
    assert gone.state is SequenceState.RUNNING
    machine.compute(step)
    machine.scheduler.commit(step, machine.next_tokens(step))
    assert (gone.state, gone.output, gone.finish_reason) == (SequenceState.FINISHED, [], None)
    machine.run()
    assert len(stays.output) == 4
    machine.check_outputs()
    machine.check_empty()


def test_a_sequence_may_be_added_while_a_step_is_in_flight(make_machine):
    machine = make_machine()
    machine.add([1] * 6)
    step = machine.scheduler.schedule()
    second = machine.add([2] * 6)
    machine.compute(step)
    machine.scheduler.commit(step, machine.next_tokens(step))
    assert second in [s for s, _, _ in machine.step().ranges]
    machine.run()
    machine.check_outputs()
