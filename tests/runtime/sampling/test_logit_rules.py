"""Penalties, bias and allowed tokens against their definitions, worked out one token at a time."""

import math
import random
import re

import numpy as np
import pytest
import torch

from kvpass.runtime.sampling.logit_rules import apply_rules
from kvpass.runtime.sampling.sampling import sample
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

VOCABULARY = 30


def request(sampling, prompt=(1,), output=(), seed=0):
    sequence = Sequence(list(prompt), 10**6, sampling, seed)
    for token in output:
        sequence.append(token)
    return sequence


def by_definition(logits, prompt, output, options):
    """One row, in float64."""
    found = []
    for token, logit in enumerate(logits.double().tolist()):
        if token in prompt or token in output:
            factor = options.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        count = list(output).count(token)
        logit -= options.frequency_penalty * count + (options.presence_penalty if count else 0)
        found.append(logit + options.logit_bias.get(token, 0.0))
    if options.allowed_tokens is not None:
        allowed = set(options.allowed_tokens(list(output)))
        found = [logit if token in allowed else -math.inf for token, logit in enumerate(found)]
    return found


def random_options(numbers):
    chance = numbers.random
    return Sampling(
        temperature=numbers.choice((0, 0.8)),
        seed=numbers.randrange(2**40),
        repetition_penalty=numbers.choice((1.0, 1.3, 0.7)),
        presence_penalty=numbers.choice((0.0, 0.5, -2.0)),
        frequency_penalty=numbers.choice((0.0, 0.25, -0.5)),
        logit_bias={} if chance() < 0.5 else {numbers.randrange(VOCABULARY): numbers.uniform(-5, 5), 3: -math.inf},
        allowed_tokens=None if chance() < 0.6 else (lambda output: [len(output) % VOCABULARY, 5, 6, 7]),
    )


def random_rows(count, seed=0):
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, 20))]
        output = [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(0, 20))]
        rows.append((prompt, output, random_options(numbers)))
    logits = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    logits[0, 4] = -math.inf
    return logits, rows


def test_rules_do_what_their_definitions_say():
    logits, rows = random_rows(60)
    before = logits.clone()
    values, failures = apply_rules(logits, [request(options, prompt, output) for prompt, output, options in rows])
    assert failures == [None] * 60 and torch.equal(logits, before)
    for row, (prompt, output, options) in enumerate(rows):
        expected = by_definition(logits[row], prompt, output, options)
        np.testing.assert_allclose(values[row].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_comes_out_the_same_in_any_batch():
    logits, rows = random_rows(60, seed=1)
    requests = [request(options, prompt, output, options.seed) for prompt, output, options in rows]
    together = sample(logits, requests)
    assert len(set(together)) > 5
    assert [sample(logits[row : row + 1], [requests[row]])[0] for row in range(60)] == together
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist()
    assert sample(logits[order], [requests[row] for row in order]) == [together[row] for row in order]


def test_half_precision_logits_are_ruled_in_float32():
    logits = torch.randn(1, VOCABULARY).bfloat16()
    values, _ = apply_rules(logits, [request(Sampling(logit_bias={2: 1e-3}))])
    assert values.dtype is torch.float32
    assert values[0, 2] == logits[0, 2].float() + 1e-3


def test_a_bias_forces_and_forbids_tokens():
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 4] = 5
    forced, forbidden = request(Sampling(logit_bias={9: 100})), request(Sampling(logit_bias={4: -math.inf}))
    assert sample(logits, [forced, forbidden]) == [9, 0]


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, torch.tensor, iter])
def test_allowed_tokens_come_in_any_form(kind):
    logits = torch.arange(VOCABULARY)[None].float()
    assert sample(logits, [request(Sampling(allowed_tokens=lambda output: kind([3, 8])))]) == [8]


@pytest.mark.parametrize("library", [np, torch])
def test_allowed_tokens_come_as_a_mask(library):
    mask = library.arange(VOCABULARY) < 12
    logits = torch.arange(VOCABULARY)[None].float()
    assert sample(logits, [request(Sampling(allowed_tokens=lambda output: mask))]) == [11]


def test_a_grammar_sees_the_output_alone():
    seen = []

    def allow(output):
        seen.append(output)
        return [0]

    sample(torch.zeros(1, VOCABULARY), [request(Sampling(allowed_tokens=allow), prompt=[5, 6], output=[7, 8])])
    assert seen == [[7, 8]]


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        (lambda output: 1 / 0, "allowed_tokens failed with ZeroDivisionError"),
        (lambda output: [1, VOCABULARY], "it gave 30, which is no token id: ids are 0 to 29"),
        (lambda output: [-1], "it gave -1"),
        (lambda output: ["a"], "it gave 'a'"),
        (lambda output: [True], "it gave True"),
        (lambda output: None, "TypeError"),
        (lambda output: torch.ones(5, dtype=torch.bool), r"a mask of shape \[5\]"),
        (lambda output: [], "leave no token to choose"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_callback_that_fails_ends_its_own_request_alone(allow, message, temperature):
    logits, rows = random_rows(4, seed=3)
    others = [request(options, prompt, output, options.seed) for prompt, output, options in rows]
    bad = request(Sampling(temperature=temperature, allowed_tokens=allow))
    tokens = sample(torch.cat((logits[:2], logits[:1], logits[2:])), [*others[:2], bad, *others[2:]])
    assert tokens[2] is None
    assert re.search(message, bad.failure)
    assert tokens[:2] + tokens[3:] == sample(logits, others)
    assert all(other.failure is None for other in others)


def test_huge_penalties_do_not_overflow_into_nan():
    logits = torch.zeros(1, VOCABULARY)
    options = Sampling(presence_penalty=1e300, frequency_penalty=-1e300, repetition_penalty=1e300)
    values, _ = apply_rules(logits, [request(options, output=[3])])
    assert not values.isnan().any()


def test_logits_that_are_not_finite_are_still_the_models_fault():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3] = math.nan
    sequence = request(Sampling(logit_bias={3: -math.inf}))
    assert sample(logits, [sequence]) == [None] and sequence.failure is None
