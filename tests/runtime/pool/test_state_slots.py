"""Slots hold what their owners expect, in whatever order they are taken, copied, released and moved."""

import random

import pytest
import torch

from kvpass.config import CacheConfig
from kvpass.errors import IntegrityError
from kvpass.planner import Demand, plan_memory
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.capacity import divide_memory
from kvpass.runtime.pool.state_slots import StateSlots, allocate_states, bytes_per_state, move_states
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.types import CachePlan, CacheSpec, StateSpec

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
PLAN = CachePlan((), 4, 10, states=tuple(StateSpec(f"{d}", (2, 3), d) for d in DTYPES[:4]))


@pytest.mark.parametrize("seed", range(4))
def test_slots_hold_what_their_owners_expect(seed):
    numbers, slots, state = random.Random(seed), StateSlots(6), torch.full((6, 2), -1)
    expected = {}  # by slot, what its owner reads there
    written = 0
    for _ in range(2000):
        choice = numbers.random()
        if choice < 0.35 and len(expected) < 6:
            expected[slots.take()] = 0
        elif choice < 0.6 and 0 < len(expected) < 6:
            source = numbers.choice(list(expected))
            expected[slots.take(like=source)] = expected[source]
        elif choice < 0.9 and expected:
            slot = numbers.choice(list(expected))
            slots.release(slot)
            del expected[slot]
        else:
            move_states((state,), slots.take_moves())
            assert slots.take_moves() == ()
            for slot in expected:
                assert state[slot].tolist() == [expected[slot]] * 2
                written += 1
                state[slot] = expected[slot] = written
        slots.check_integrity(list(expected))
        assert slots.num_used == len(expected)
    assert written > 200


def test_states_of_every_dtype_are_copied_and_zeroed_bit_by_bit():
    for dtype in DTYPES:
        for shape in ((4,), (4, 3), (4, 2, 1, 3)):
            state = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
            before = state.clone()
            slots = StateSlots(4)
            for _ in range(2):
                slots.take()
            slots.take_moves()
            slots.take(like=1)
            slots.take()
            move_states((state,), slots.take_moves())
            bits = [tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1) for tensor in (state, before)]
            found, old = (tensor.view(torch.uint8) for tensor in bits)
            assert torch.equal(found[:2], old[:2]) and torch.equal(found[2], old[1]) and not found[3].any()


def test_wrong_use_and_broken_invariants_are_told():
    slots = StateSlots(2)
    first, second = slots.take(), slots.take()
    with pytest.raises(IntegrityError, match="more sequences run than there are state slots"):
        slots.take()
    slots.release(second)
    for wrong, message in (
        (lambda: slots.release(second), "released but has no owner"),
        (lambda: slots.take(like=second), "free and cannot be copied"),
        (lambda: slots.check_integrity([first, first]), "two owners"),
        (lambda: slots.check_integrity([first, None]), "without a state slot"),
        (lambda: slots.check_integrity([]), "not those that the running sequences have"),
    ):
        with pytest.raises(IntegrityError, match=message):
            wrong()
    slots.check_integrity([first])
    slots.reset()
    slots.check_integrity([])


def test_the_scheduler_neither_shares_nor_swaps_states():
    pool = BlockPool(8, 4)
    with pytest.raises(IntegrityError, match="neither shared nor swapped"):
        Scheduler(pool, PrefixCache(pool), 8, 8, slots=StateSlots(8))
    with pytest.raises(IntegrityError, match="neither shared nor swapped"):
        Scheduler(pool, None, 8, 8, swap=object(), slots=StateSlots(8))


def test_the_tensors_take_what_was_counted_and_can_be_written_in_any_mode():
    with torch.inference_mode():
        states = allocate_states(PLAN, 5, "cpu")
    assert sum(state.nbytes for state in states) == 5 * bytes_per_state(PLAN) == 5 * 6 * (4 + 2 + 8 + 1)
    assert not any(state.is_inference() for state in states)


def test_the_planner_counts_states():
    plan = CachePlan(
        (CacheSpec("a", 1, 4, 4, "float32", "float32"),), 4, 10, states=(StateSpec("s", (25,), torch.float32),)
    )
    config = CacheConfig(block_size=4, memory=100 * 8 + 128 * 20, max_sequences=8)
    room = divide_memory(plan, config)
    found = plan_memory(32, plan, plan, config, Demand(context=16, shared_prefix=8, requests=3))
    assert (room.num_blocks, room.state_slots, room.state_bytes) == (20, 8, 800)
    assert found.bytes_reserved == 20 * 128 + 800
    for stage in found.stages[1:]:
        assert (stage.bytes_of_sequence, stage.bytes_of_requests, stage.fit) == (4 * 128 + 100, 3 * (4 * 128 + 100), 5)
    few = plan_memory(32, plan, plan, CacheConfig(block_size=4, num_blocks=99, max_sequences=8), Demand(context=16))
    assert few.stages[-1].fit == 8
