"""The decoders under test: they run, they are causal, and a broken cache would show in what they generate."""

import copy

import pytest
import torch

from tests.decoders.catalogue import DECODERS, NEAR_SIGHTED, UNUSUAL
from tests.decoders.skeleton import VOCAB
from tests.parity.compiled import original_of
from tests.parity.harness import assert_not_blind, original_logits, ragged_prompts

ALL = {**DECODERS, **UNUSUAL}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", ALL)
def test_history_matters(name: str) -> None:
    assert_not_blind(original_of(name), ragged_prompts(VOCAB), seen=0.05 if name in NEAR_SIGHTED else 0.7)


@pytest.mark.parametrize("name", ALL)
def test_no_token_sees_a_later_one(name: str) -> None:
    model = original_of(name)
    ids = torch.tensor(ragged_prompts(VOCAB)[2:3])
    other = ids.clone()
    other[:, 20:] = (ids[:, 20:] + 1) % VOCAB
    torch.testing.assert_close(original_logits(model, ids)[:, :20], original_logits(model, other)[:, :20])


def test_same_seed_gives_the_same_weights() -> None:
    build = DECODERS["GPT-2 with a tril buffer slice"]
    first, second, other = build(1), build(1), build(2)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(first.wte.weight, other.wte.weight)
    assert copy.deepcopy(first).lm_head.weight.data_ptr() != first.lm_head.weight.data_ptr()
