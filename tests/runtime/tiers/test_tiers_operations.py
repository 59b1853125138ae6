"""Random operations with blocks that are wiped, and go to host memory and disk and back: the tokens are the same."""

import numpy as np
import pytest

from tests.runtime.settling_machine import play_settling
from tests.runtime.tiered_machine import TieredMachine, play_tiers


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(14))
def test_tiers_and_wiping_change_no_token(tmp_path, seed):
    play_tiers(seed, 250, tmp_path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", (5, 7, 11, 17, 23))
def test_blocks_that_settle_come_back_as_they_left(tmp_path, seed):
    play_settling(seed, 150, tmp_path)


def test_a_prefix_that_was_evicted_is_not_computed_again(tmp_path):
    machine = TieredMachine(tmp_path, 12, 4, (None, 6), host_blocks=60, disk_blocks=0, policy="lru", swap_blocks=0)
    prompt = np.random.default_rng(0).integers(0, 5, 17).tolist()
    machine.add(prompt, 1)
    machine.run()
    for token in range(6):
        machine.add([token % 5, *np.random.default_rng(token).integers(0, 5, 16).tolist()], 2)
        machine.run()
    assert not machine.prefix.match(np.array(prompt, dtype=np.int32), 16).path
    machine.add(prompt, 4)
    assert machine.step().ranges[0][1:] == (16, 17)
    assert machine.tiers.counts.promoted == 4 + 2  # the window looks at two blocks
    machine.run()
    machine.check_outputs()
    machine.check_empty()


def test_what_a_window_group_alone_has_given_up_is_brought_back(tmp_path):
    machine = TieredMachine(
        tmp_path, 14, 4, (None, 6), host_blocks=60, disk_blocks=0, policy="lru", swap_blocks=0, max_batch_tokens=40
    )
    prompt = np.random.default_rng(0).integers(0, 5, 17).tolist()
    machine.add(prompt, 1)
    machine.run()
    blocks = [block for _, group, _, block in machine.prefix.held_blocks() if group == 1]
    while any(block in machine.prefix._nodes for block in blocks):
        machine.prefix.make_room()
    machine.moves.flush()
    found = machine.prefix.match(np.array(prompt, dtype=np.int32), 16)
    assert (len(found.path), len(found.beyond), len(found.stored)) == (0, 4, 4)
    machine.add(prompt, 4)
    assert machine.step().ranges[0][1:] == (16, 17)
    assert machine.tiers.counts.promoted == 2  # the window looks at two blocks; the others are there
    machine.run()
    machine.check_outputs()
    machine.check_empty()
