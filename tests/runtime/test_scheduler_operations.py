"""Random operations on the scheduler: whatever happens in whatever order, the tokens are the same."""

import random

import numpy as np
import pytest

from kvpass.errors import CapacityError
from kvpass.runtime.sequence import SequenceState


def random_prompt(numbers):
    """Prompts that share prefixes often: a tree with few branches."""
    return [numbers.choice((0, 0, 1)) for _ in range(numbers.randint(1, 14))]


OPERATIONS = {
    "add": 30,
    "step": 60,
    "propose": 20,
    "fork": 8,
    "pin": 2,
    "wait": 4,
    "lose": 1,
    "cancel": 4,
    "cancel in flight": 4,
    "fail": 4,
    "break": 2,
    "clear": 1,
}


def operate(machine, numbers):
    """One random operation, of all that can happen to a scheduler."""
    live = [s for s, _ in machine.sequences if s.state in (SequenceState.WAITING, SequenceState.RUNNING)]
    match numbers.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]:
        case "add" if len(live) < 12:
            options = {
                "priority": numbers.choice((0, 0, 0, 1, 3)),
                "tenant": numbers.choice("ab"),
                "deadline": machine.now + numbers.randint(1, 9) if numbers.random() < 0.1 else None,
                "namespace": numbers.choice(("", "", "other")),
            }
            try:
                machine.add(random_prompt(numbers), numbers.randint(1, 12), numbers.choice(((), (0,))), **options)
            except CapacityError:
                assert machine.pool.num_blocks * machine.pool.block_size < 3 * (14 + 12 + 2 * machine.pool.block_size)
        case "cancel":
            machine.scheduler.cancel(numbers.sample(live, min(len(live), 2)))
        case "fail":
            step = machine.scheduler.schedule()
            machine.scheduler.check_integrity()
            assert machine.scheduler.recover() == bool(step.ranges)
        case "break":
            step = machine.scheduler.schedule()
            if step.ranges:
                machine.compute(step)
                failing = numbers.randrange(len(step.sampled) + 1)
                chosen = [new if i != failing else None for i, new in enumerate(machine.next_tokens(step))]
                machine.scheduler.commit(step, chosen)
        case "fork" if live and len(live) < 12:
            machine.fork(numbers.choice(live), numbers.randint(1, 3))
        case "pin" if machine.prefix is not None:
            machine.prefix.pin(np.array(random_prompt(numbers), dtype=np.int32), numbers.choice((None, 3.0)))
        case "lose" if machine.host is not None:
            machine.host.lost = not machine.host.lost
        case "wait":
            machine.now += 1.0
        case "cancel in flight":
            step = machine.scheduler.schedule()
            machine.scheduler.cancel(numbers.sample(live, min(len(live), 2)))
            machine.scheduler.check_integrity()
            if step.ranges:
                machine.compute(step)
                machine.scheduler.commit(step, machine.next_tokens(step))
        case "propose":
            for sequence in live:
                machine.propose(sequence, numbers.randrange(5), numbers.randrange(3))
        case "clear":
            machine.scheduler.clear_prefix_cache()
        case _:
            machine.step()
    machine.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(120))
def test_any_order_of_operations_gives_the_same_tokens(make_machine, seed):
    numbers = random.Random(seed)
    machine = make_machine(
        num_blocks=numbers.choice((3, 6, 9, 20)),
        block_size=numbers.choice((1, 2, 4)),
        sharing=seed % 4 != 0,
        max_batch_tokens=numbers.choice((1, 3, 8, 40)),
        max_sequences=numbers.choice((1, 3, 8)),
        windows=(None,) if seed < 40 else numbers.choices((None, 1, 2, 3, 6, 11), k=numbers.randint(1, 3)),
        host_blocks=numbers.choice((0, 4, 40)),
    )
    for _ in range(250):
        operate(machine, numbers)
    machine.now += 100
    machine.run()
    machine.check_outputs()
    machine.check_empty()
