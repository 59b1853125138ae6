"""The numbers of a forward's code are found wherever it names them."""

import cProfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.fx_passes.validation.code_numbers import numbers_of_code
from tests.fx_passes.validation.test_compare_capture import CONFIG, Watchful

LIMIT = 77
TABLE = {"long": [78, "79"]}


@dataclass
class Settings:
    window: int = 81
    more: dict[str, Any] = field(default_factory=lambda: {"sizes": (82,)})


def _helper(length: int, among: frozenset[int] = frozenset({83})) -> bool:
    return length in among or str(length) == "84"


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        enclosed = 85
        self.settings, self.limit = Settings(), 86
        self.condition: Callable[[int], bool] = lambda length: length == enclosed

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return ids * (length == LIMIT or length in TABLE["long"] or _helper(length) or self.condition(length) or 87)


def test_constants_variables_attributes_and_configurations() -> None:
    found = numbers_of_code(Many(), torch.zeros(1, 3, dtype=torch.int64))
    assert {77, 78, 79, 81, 82, 83, 84, 85, 86, 87} <= found
    assert not found & set(range(90, 2000))


@pytest.mark.parametrize(
    "window",
    [
        lambda ids: 8 if type(ids.shape[1]) is int and ids.shape[1] == 100 else 100000,
        lambda ids: 8 if type(ids.shape[1]) is int and ids.shape[1] + 1 == LIMIT else 100000,
        lambda ids: 8 if type(ids.shape[1]) is int and ids.shape[1] in Settings().more["sizes"] else 100000,
    ],
    ids=["a constant", "a global, less one", "a configuration"],
)
def test_a_single_length_that_the_export_does_not_see_is_found(window: Callable[[Tensor], int]) -> None:
    with pytest.raises(
        kvpass.VerificationError, match=r"FAILED capture on texts of \d+ lengths at numbers of the code"
    ):
        kvpass.compile(Watchful(window).eval(), CONFIG)


def test_a_profiler_of_c_goes_on() -> None:
    profiler = cProfile.Profile()
    with profiler:
        numbers_of_code(Many(), torch.zeros(1, 3, dtype=torch.int64))
        sum(range(3))
    assert any("sum" in str(entry.code) for entry in profiler.getstats())


def test_a_profiler_goes_on() -> None:
    import sys

    def profiler(*_: object) -> None:
        return None

    sys.setprofile(profiler)
    try:
        numbers_of_code(Many(), torch.zeros(1, 3, dtype=torch.int64))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
