"""A fault planted in a pass is caught: a small part of `python -m benchmarks.mutants`."""

import pytest

from kvpass.fx_passes.attention.read_scores import _scale
from tests.mutation.mutants import MUTANTS, judge, mutated_source, planted, probe_of


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "catcher"),
    [
        ("scale dropped", "verification"),
        ("window one too wide", "verification"),
        ("mask upside down", "refusal"),
        ("ops along the tokens allowed", "verification"),
    ],
)
def test_caught(name: str, catcher: str) -> None:
    assert judge(MUTANTS[name]).by == catcher


def test_every_mutant_still_finds_its_place() -> None:
    for mutant in MUTANTS.values():
        compile(mutated_source(mutant), mutant.where, "exec")
        assert callable(probe_of(mutant))


def test_a_fault_is_taken_out_again() -> None:
    before = _scale.__code__
    with planted(MUTANTS["scale dropped"]):
        assert _scale.__code__ is not before
    assert _scale.__code__ is before
