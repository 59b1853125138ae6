"""Random operations on a scheduler: all that can happen to it, in any order."""

import random

import numpy as np

from kvpass.errors import CapacityError
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from tests.runtime.machine import Machine

# Name of each operation, and how often it is drawn.
OPERATIONS = {
    "add": 30,
    "samples": 8,
    "beams": 6,
    "step": 60,
    "propose": 20,
    "fork": 8,
    "finish": 4,
    "pin": 2,
    "unpin": 1,
    "evict": 2,
    "wait": 4,
    "lose": 1,
    "cancel": 4,
    "cancel in flight": 4,
    "add in flight": 4,
    "fail": 4,
    "break": 2,
    "clear": 1,
    "drop": 1,
}
MOST_LIVE = 12
LONGEST_PROMPT = 14
MOST_NEW = 12


def draw_machine(numbers: random.Random) -> Machine:
    """A machine of any sizes: with and without sharing, groups with windows, memory to swap to, recurrent states."""
    windows = (None,)
    if numbers.random() < 0.6:
        windows = tuple(numbers.choices((None, 1, 2, 3, 6, 11), k=numbers.randint(1, 3)))
    recurrent = numbers.random() < 0.3  # states are neither shared nor swapped
    return Machine(
        num_blocks=numbers.choice((3, 6, 9, 20, 40)),
        block_size=numbers.choice((1, 2, 4)),
        sharing=numbers.random() < 0.75 and not recurrent,
        max_batch_tokens=numbers.choice((1, 3, 8, 40)),
        max_sequences=numbers.choice((1, 3, 8)),
        windows=windows,
        host_blocks=0 if recurrent else numbers.choice((0, 4, 40)),
        recurrent=recurrent,
    )


def random_prompt(machine: Machine, numbers: random.Random) -> list[int]:
    """Prompts that share prefixes often: a tree with few branches."""
    tokens = [numbers.choice((0, 0, 1)) for _ in range(numbers.randint(1, LONGEST_PROMPT))]
    return [token for token in tokens for _ in range(machine.stretch)]


def is_small(machine: Machine) -> bool:
    """Whether a request may be too long for the whole pool."""
    longest = (LONGEST_PROMPT + MOST_NEW) * machine.stretch
    return machine.pool.num_blocks < len(machine.windows) * machine.pool.blocks_for(longest)


def draw_operation(numbers: random.Random) -> str:
    """The name of one operation."""
    return numbers.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]


def add(machine: Machine, numbers: random.Random, samples: int = 1) -> None:
    options = {
        "priority": numbers.choice((0, 0, 0, 1, 3)),
        "tenant": numbers.choice("ab"),
        "deadline": machine.now + numbers.randint(1, 9) if numbers.random() < 0.1 else None,
        "namespace": numbers.choice(("", "", "other")),
    }
    try:
        stop_ids = numbers.choice(((), (0,)))
        new = numbers.randint(1, MOST_NEW) * machine.stretch
        machine.add_samples(samples, random_prompt(machine, numbers), new, stop_ids, **options)
    except CapacityError:
        assert is_small(machine)


def add_beams(machine: Machine, numbers: random.Random) -> None:
    namespace = numbers.choice(("", "", "other"))
    own = random.Random(numbers.random())
    try:
        prompt = random_prompt(machine, numbers)
        machine.add_beams(numbers.randint(1, 4), numbers.randrange(9), own, prompt, namespace=namespace)
    except CapacityError:
        assert is_small(machine)


def fork(machine: Machine, numbers: random.Random, sequence: Sequence) -> None:
    """Fork a sequence; and now and then, before anything is copied, one of the twins as well, or end the first one."""
    twins = machine.fork(sequence, numbers.randint(1, 3))
    if numbers.random() < 0.3:
        machine.fork(twins[0], 1)
    if numbers.random() < 0.3:
        machine.scheduler.cancel([sequence])


def operate(machine: Machine, numbers: random.Random, name: str) -> None:
    """Do ``name`` to the machine, and check every invariant."""
    live = [s for s, _ in machine.sequences if s.state in (SequenceState.WAITING, SequenceState.RUNNING)]
    plain = [sequence for sequence in live if not machine.held_later(sequence)]
    some = numbers.sample(live, min(len(live), 2))
    match name:
        case "add" if len(live) < MOST_LIVE:
            add(machine, numbers)
        case "samples" if len(live) < MOST_LIVE:
            add(machine, numbers, numbers.randint(2, 4))
        case "beams" if len(live) < MOST_LIVE:
            add_beams(machine, numbers)
        case "fork" if plain and len(live) < MOST_LIVE:
            fork(machine, numbers, numbers.choice(plain))
        case "propose":
            for sequence in plain:
                machine.propose(sequence, numbers.randrange(5), numbers.randrange(3), numbers.choice((0, 0, 1, 2)))
        case "finish":
            for _ in range(20):
                machine.step()
        case "pin" if machine.prefix is not None:
            machine.prefix.pin(np.array(random_prompt(machine, numbers), dtype=np.int32), numbers.choice((None, 3.0)))
        case "unpin" if machine.prefix is not None:
            machine.prefix.pins.release_oldest()
        case "evict":
            machine.pool.release(machine.pool.allocate(numbers.randint(0, machine.pool.num_available)))
        case "lose" if machine.host is not None:
            machine.host.lost = not machine.host.lost
        case "wait":
            machine.now += 1.0
        case "cancel":
            machine.scheduler.cancel(some)
        case "cancel in flight" | "add in flight":
            step = machine.scheduler.schedule()
            if name == "cancel in flight":
                machine.scheduler.cancel(some)
            elif len(live) < MOST_LIVE:
                add(machine, numbers, numbers.choice((1, 1, 3)))
            machine.scheduler.check_integrity()
            if step.ranges:
                machine.compute(step)
                machine.scheduler.commit(step, machine.next_tokens(step))
        case "fail":
            step = machine.scheduler.schedule()
            machine.scheduler.check_integrity()
            if step.ranges and numbers.random() < 0.5:
                machine.compute(step)
            assert machine.scheduler.recover() == bool(step.ranges)
        case "break":
            step = machine.scheduler.schedule()
            if step.ranges:
                machine.compute(step)
                failing = numbers.randrange(len(step.sampled) + 1)
                chosen = [new if i != failing else None for i, new in enumerate(machine.next_tokens(step))]
                machine.scheduler.commit(step, chosen)
        case "clear":
            machine.scheduler.clear_prefix_cache()
        case "drop" if machine.prefix is not None:
            machine.prefix.drop("other")
        case _:
            machine.step()
    machine.scheduler.check_integrity()
    machine.forget_finished()


def finish(machine: Machine) -> None:
    """Let everybody come to an end, and check that the tokens are right and nothing is left behind."""
    machine.now += 100
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def play(seed: int, operations: int) -> Machine:
    """A machine after so many operations, and after its end."""
    numbers = random.Random(seed)
    machine = draw_machine(numbers)
    for _ in range(operations):
        operate(machine, numbers, draw_operation(numbers))
    finish(machine)
    return machine
