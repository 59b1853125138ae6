import math

import numpy as np
import pytest
import torch

from kvpass.runtime.sampling.sampling import sample
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling


def by_definition(logits):
    values = logits.double().numpy()
    return values - values.max() - math.log(np.exp(values - values.max()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 5.0])
def test_they_are_those_of_the_models_own_distribution(dtype, temperature):
    torch.manual_seed(0)
    logits = (torch.randn(6, 200) * 3).to(dtype)
    # Whatever else is asked for does not change what is reported.
    options = [
        Sampling(temperature, seed=row, logprobs=count, logit_bias={7: 3.0}, top_k=9, presence_penalty=1.0)
        for row, count in enumerate((0, 1, 5, 5, 200, 10**6))
    ]
    sequences = [Sequence([1], 10, s, s.seed) for s in options]
    tokens = sample(logits, sequences)
    for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        (found,) = sequence.logprobs
        expected = by_definition(logits[row])
        assert found.token == token
        assert found.logprob == pytest.approx(expected[token], abs=1e-4)
        assert len(found.top) == min(sequence.sampling.logprobs, 200)
        likeliest = sorted(expected, reverse=True)[: len(found.top)]
        assert [value for _, value in found.top] == pytest.approx(likeliest, abs=1e-4)
        assert [expected[token] for token, _ in found.top] == pytest.approx(likeliest, abs=1e-4)
        alone = Sequence([1], 10, sequence.sampling, sequence.seed)
        sample(logits[row : row + 1], [alone])
        assert alone.logprobs == sequence.logprobs


def test_a_step_that_is_computed_again_overwrites_what_it_recorded():
    sequence = Sequence([1], 10, Sampling(logprobs=2), 0)
    for row in torch.randn(4, 1, 50):
        sample(torch.zeros(1, 50), [sequence])  # this step fails after its tokens were chosen
        (token,) = sample(row, [sequence])
        sequence.append(token)
    assert [entry.token for entry in sequence.logprobs] == sequence.output


def test_none_are_recorded_unless_asked_for_or_where_no_token_was_chosen():
    quiet, broken = Sequence([1], 10, Sampling(), 0), Sequence([1], 10, Sampling(logprobs=3), 0)
    logits = torch.zeros(2, 50)
    logits[1] = math.nan
    sample(logits, [quiet, broken])
    assert quiet.logprobs == broken.logprobs == []
