"""The conditions under which a captured graph is the model, and how long a sequence they allow."""

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv, Mod, ModularIndexing, PowByNatural, PythonMod

from kvpass.fx_passes.capture.length_conditions import failing_lengths
from kvpass.fx_passes.graph import HORIZON
from tests.fx_passes.tracing import VOCAB, captured

B, S = sympy.symbols("b s", integer=True, positive=True)
# Each with the same in Python, for one batch size.
CONDITIONS = {
    "a bound": (sympy.Le(S, 300), lambda b, s: s <= 300),
    "a sum": (sympy.Le(S + 50, 150), lambda b, s: s + 50 <= 150),
    "a multiple": (sympy.Le(2 * S, 601), lambda b, s: 2 * s <= 601),
    "a quotient": (sympy.Le(FloorDiv(S, 16), 8), lambda b, s: s // 16 <= 8),
    "a square": (sympy.Le(S**2, 90000), lambda b, s: s * s <= 90000),
    "pairs": (sympy.Lt(FloorDiv(S * (S - 1), 2), 5000), lambda b, s: s * (s - 1) // 2 < 5000),
    "one length": (sympy.Ne(S, 77), lambda b, s: s != 77),
    "a remainder": (sympy.Ne(Mod(S, 64), 0), lambda b, s: s % 64 != 0),
    "Python's remainder": (sympy.Ne(PythonMod(7 - S, 64), 0), lambda b, s: (7 - s) % 64 != 0),
    "a digit": (sympy.Lt(ModularIndexing(S, 7, 50), 49), lambda b, s: s // 7 % 50 < 49),
    "a true quotient": (sympy.Lt(IntTrueDiv(S, 3), 70.2), lambda b, s: s / 3 < 70.2),
    "a remainder far off": (sympy.Ne(Mod(S + 3, 1000), 1), lambda b, s: (s + 3) % 1000 != 1),
    "either": (sympy.Or(sympy.Lt(S, 40), sympy.Gt(S, 1500)), lambda b, s: s < 40 or s > 1500),
    "tokens of the batch": (sympy.Le(B * S, 1000), lambda b, s: b * s <= 1000),
    "always": (sympy.Ge(S, 2), lambda b, s: True),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_length_at_which_a_condition_fails_is_found(name: str) -> None:
    condition, same = CONDITIONS[name]
    found, tried = failing_lengths(condition, B, S)
    wanted = [n for n in range(2, 3000) if not (same(2, n) and same(3, n))]
    assert [n for n in found if n < 3000] == wanted
    assert tried == HORIZON


def test_a_condition_far_off_is_found_and_one_beyond_whole_numbers_ends_what_is_known() -> None:
    assert failing_lengths(sympy.Lt(S, 1_000_003), B, S)[0][0] == 1_000_003
    assert failing_lengths(sympy.Lt(S, HORIZON + 1), B, S) == ([], HORIZON)
    assert failing_lengths(sympy.Lt(PowByNatural(S, 5), 10**18), B, S)[0][0] == 3982
    assert failing_lengths(sympy.Lt(PowByNatural(S, 5), 4 * 10**18), B, S) == ([], 4096)


def test_a_condition_that_cannot_be_computed_at_once_is_tried_one_by_one() -> None:
    class Odd(sympy.Function):
        @classmethod
        def eval(cls, n: sympy.Basic) -> sympy.Basic | None:
            return sympy.Integer(n % 2) if n.is_number else None

    found, tried = failing_lengths(sympy.Or(sympy.Eq(Odd(S), 1), sympy.Lt(S, 100)), B, S)
    assert found == list(range(100, tried + 1, 2))


class Switched(nn.Module):
    """Takes another branch at some lengths, which changes something at some of them."""

    def __init__(self, branch, changes) -> None:
        super().__init__()
        self.embed, self.branch, self.changes = nn.Embedding(VOCAB, VOCAB), branch, changes

    def forward(self, ids: Tensor) -> Tensor:
        x, s = self.embed(ids), ids.size(1)
        return x * 2 if self.branch(s) and self.changes(s) else x


LIMITS = {
    "blocks of the length": (lambda s: s // 16 > 8, lambda s: True, 143),
    "blocks that change nothing at first": (lambda s: s % 64 == 0, lambda s: s > 150, 191),
    "a length that changes nothing": (lambda s: s == 64, lambda s: False, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_graph_holds_up_to_the_first_length_at_which_the_model_is_another(name: str) -> None:
    branch, changes, limit = LIMITS[name]
    model = Switched(branch, changes)
    graph = captured(model)
    assert graph.max_length == limit
    for length in (limit or 200, 64):
        ids = torch.arange(2 * length).view(2, length) % VOCAB
        torch.testing.assert_close(graph.module(ids)[0], model(ids))
    if limit is not None:
        ids = torch.zeros(2, limit + 1, dtype=torch.int64)
        assert not torch.equal(graph.module(ids)[0], model(ids))
