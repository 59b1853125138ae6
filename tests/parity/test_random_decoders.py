"""Random attentions are right or refused: a small part of `python -m benchmarks.spelling_sweep`."""

import pytest

from tests.grammar.check import judge
from tests.grammar.decoder import UNSOUND, describe, draw


@pytest.mark.slow
@pytest.mark.parametrize("first", [100_000, 200_004])
def test_right(first: int) -> None:
    verdicts = judge([draw(seed) for seed in range(first, first + 6)])
    assert len(verdicts) == 6
    assert [str(verdict) for verdict in verdicts if verdict.outcome != "right"] == []


@pytest.mark.slow
def test_unsound_ones_are_refused() -> None:
    specs = [{**draw(300_000 + i), "route": "written out", "unsound": fault} for i, fault in enumerate(UNSOUND)]
    verdicts = judge(specs, verify=False)
    assert [str(verdict) for verdict in verdicts if verdict.outcome != "refused"] == []


def test_a_wrong_engine_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.parity import paged_logits

    sound = paged_logits._scattered_tables
    monkeypatch.setattr(paged_logits, "_scattered_tables", lambda needed: sound(needed).flip(0))
    assert judge([draw(100_000)])[0].outcome == "wrong"


def test_a_seed_gives_the_same_choices() -> None:
    assert draw(7) == draw(7) and draw(7) != draw(8)
    assert "seed=7" in describe(draw(7))
