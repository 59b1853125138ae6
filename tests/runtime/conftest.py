import pytest

from tests.runtime.machine import Machine


@pytest.fixture
def make_machine():
    return Machine
