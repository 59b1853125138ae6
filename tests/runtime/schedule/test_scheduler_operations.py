"""Random operations on the scheduler: whatever happens in whatever order, the tokens are the same and no block is lost.

``python -m benchmarks.runtime_operations`` does a million of them.
"""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.runtime.operations import OPERATIONS, draw_machine, finish, operate, play


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_operations_gives_the_same_tokens(seed):
    play(seed, 200)


class SchedulerOperations(RuleBasedStateMachine):
    """The same, drawn and shrunk by hypothesis."""

    @initialize(numbers=st.randoms(use_true_random=False))
    def start(self, numbers: random.Random) -> None:
        self.machine = draw_machine(numbers)

    @rule(name=st.sampled_from(sorted(OPERATIONS)), numbers=st.randoms(use_true_random=False))
    def operate(self, name: str, numbers: random.Random) -> None:
        operate(self.machine, numbers, name)

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            finish(self.machine)


TestSchedulerOperations = SchedulerOperations.TestCase
TestSchedulerOperations.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
