"""Random operations on the scheduler: whatever happens in whatever order, the tokens are the same."""

import random

import pytest

from kvpass.errors import CapacityError
from kvpass.runtime.sequence import SequenceState


def random_prompt(numbers):
    """Prompts that share prefixes often: a tree with few branches."""
    return [numbers.choice((0, 0, 1)) for _ in range(numbers.randint(1, 14))]


def operate(machine, numbers):
    """One random operation, of all that can happen to a scheduler."""
    live = [s for s, _ in machine.sequences if s.state in (SequenceState.WAITING, SequenceState.RUNNING)]
    match numbers.choices(("add", "step", "propose", "cancel", "fail", "break", "clear"), (30, 60, 20, 4, 4, 2, 1))[0]:
        case "add" if len(live) < 12:
            try:
                machine.add(random_prompt(numbers), numbers.randint(1, 12), numbers.choice(((), (0,))))
            except CapacityError:
                assert machine.pool.num_blocks * machine.pool.block_size < 14 + 12
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
        case "propose":
            for sequence in live:
                machine.propose(sequence, numbers.randrange(5), numbers.randrange(3))
        case "clear":
            machine.scheduler.clear_prefix_cache()
        case _:
            machine.step()
    machine.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(80))
def test_any_order_of_operations_gives_the_same_tokens(make_machine, seed):
    numbers = random.Random(seed)
    machine = make_machine(
        num_blocks=numbers.choice((3, 6, 9, 20)),
        block_size=numbers.choice((1, 2, 4)),
        sharing=seed % 4 != 0,
        max_batch_tokens=numbers.choice((1, 3, 8, 40)),
        max_sequences=numbers.choice((1, 3, 8)),
        window=None if seed < 60 else numbers.choice((1, 2, 3, 6, 11)),
    )
    for _ in range(250):
        operate(machine, numbers)
    machine.run()
    machine.check_outputs()
    machine.check_empty()
