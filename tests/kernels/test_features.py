"""Every attention op, in every format, with features drawn at random, against the naive truth."""

from __future__ import annotations

import random

import pytest
import torch

from kvpass.kernels.reference import backend as reference
from tests.kernels.random_cases import ATTENTIONS, attention_case
from tests.kernels.settled_cases import NAMES

SEEDS = 4


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", ATTENTIONS)
def test_the_reference_means_what_it_says(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(SEEDS):
        pick = random.Random(seed)
        other = pick.choice(NAMES)
        case = attention_case(seed, op, *pick.choice(((name, other), (other, name), (name, name))))
        if seed % 2:  # gathered in crumbs: chunks, parts of a row, pieces of a prefill
            monkeypatch.setitem(reference.GATHER_BYTES, "cpu", pick.choice((1, 9 << 10)))
            monkeypatch.setitem(reference.SCORE_BYTES, "cpu", pick.choice((1, 8 << 10)))
        case.check(getattr(reference, op))
        monkeypatch.undo()


def test_a_wrong_result_is_noticed() -> None:
    case = attention_case(6, "paged_attention", "int8", "int4")
    right = case.wanted()[0].to(case.arguments["query"].dtype)
    case.check(lambda **_: right)
    for wrong in (right * 1.02, right.flip(0).flip(1), torch.full_like(right, torch.nan)):
        with pytest.raises(AssertionError, match="seed 6"):
            case.check(lambda result=wrong, **_: result)
