"""A sample of the attack sweep, and that its judges see what is wrong."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from kvpass.fx_passes.token_axis.axes import Factor, Kind
from kvpass.fx_passes.value_ledger import ValueLedger
from kvpass.types import MaskMeaning
from tests.attack import lengths, operands, parameters
from tests.attack.verdict import Verdict
from tests.fx_passes.mask_tracing import TracedMask


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def held(found: list[Verdict], refused: int, right: int) -> None:
    assert [str(verdict) for verdict in found if verdict.outcome == "wrong"] == []
    outcomes = [verdict.outcome for verdict in found]
    assert outcomes.count("refused") >= refused and outcomes.count("right") >= right


def test_operands() -> None:
    held(list(operands.judge([operands.draw_chain(3 * n) for n in range(12)])), 2, 2)


def test_lengths() -> None:
    held(list(lengths.judge([lengths.draw_example(3 * n + 1) for n in range(15)])), 2, 2)


def test_parameters() -> None:
    held(list(parameters.judge(3 * parameters.CHANGES * parameters.NAMES.index("mask") + 2, 12)), 2, 2)


def test_a_mask_that_is_read_wrong_is_seen() -> None:
    example = next(
        e for n in range(99) if (e := lengths.draw_example(3 * n + 1)).mask and "W" in e.text.splitlines()[-1]
    )
    with patch.object(TracedMask, "meaning", lambda self, **given: MaskMeaning(window=1, evidence="a lie")):
        (found,) = lengths.judge([example])
    assert found.outcome == "wrong"


def test_an_operand_that_is_accepted_wrong_is_seen() -> None:
    chain = operands.Chain(0, False, "def chain(m, x):\n    return x * x.mean()\n")
    (found,) = operands.judge([chain])
    assert found.outcome == "refused"
    model = operands.Cases({"0": chain.function()})
    axes = ((Factor(Kind.BATCH, 2),), (Factor(Kind.TOKEN, 6),), (Factor(Kind.PLAIN, 6),))
    (fault,) = operands._faults(model, model, {0: axes}).values()
    assert "moves the rows of other tokens" in fault or "other rows" in fault


def test_a_change_that_is_not_followed_is_seen() -> None:
    with patch.object(ValueLedger, "record", lambda *given: None):
        found = list(parameters.judge(3 * parameters.CHANGES * parameters.NAMES.index("mask") + 2, 12))
    assert any(verdict.outcome == "wrong" for verdict in found)
