"""Penalties, grammars, log-probabilities and stop strings through the engine, against a loop that has no cache."""

import math
import random

import numpy as np
import pytest
import torch

from kvpass.errors import ConfigError, InputError, KvpassError
from kvpass.runtime.sequences.output_text import decode_of
from kvpass.types import Sampling
from tests.history_engine import VOCABULARY, check_idle, logits_of, make_engine, naive, ragged


def spell(tokens):
    return "".join(chr(ord("A") + token) for token in tokens)


def engine_with_text(**options):
    engine = make_engine(**options)
    engine._decode = decode_of(spell)
    return engine


def greedy_with_rules(prompt, count, options):
    """Greedy continuation by the definitions of the options, in float64."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        scores = logits_of(tokens).astype(np.float64)
        output = tokens[len(prompt) :]
        for token in set(tokens):
            scores[token] *= options.repetition_penalty if scores[token] < 0 else 1 / options.repetition_penalty
        for token in set(output):
            scores[token] -= options.presence_penalty + options.frequency_penalty * output.count(token)
        for token, bias in options.logit_bias.items():
            scores[token] += bias
        if options.allowed_tokens is not None:
            scores[[token for token in range(VOCABULARY) if token not in options.allowed_tokens(output)]] = -math.inf
        tokens.append(int(scores.argmax()))
        if any(stop in spell(tokens[len(prompt) :]) for stop in options.stop):
            break
    return tokens[len(prompt) :]


def some_options(prompts):
    numbers = random.Random(5)
    for prompt in prompts:
        unruled = spell(naive(prompt, 30))
        yield numbers.choice(
            [
                Sampling(),
                Sampling(repetition_penalty=1.5),
                Sampling(presence_penalty=1.0, frequency_penalty=0.3, logprobs=3),
                Sampling(logit_bias={5: 2.0, 6: -math.inf}, repetition_penalty=0.8),
                Sampling(allowed_tokens=lambda output: {2 + len(output) % 3, 20, 21, 22}),
                Sampling(stop=(unruled[7:9], unruled[20])),
            ]
        )


@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("max_batch_tokens", [5, 2048])
def test_tokens_are_those_of_the_definitions_in_any_mix(num_blocks, max_batch_tokens):
    prompts = ragged(20, seed=3)
    options = list(some_options(prompts))
    engine = engine_with_text(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, max_sequences=6)
    expected = [greedy_with_rules(prompt, 14, s) for prompt, s in zip(prompts, options, strict=True)]
    assert engine.generate(prompts, 14, options) == expected
    check_idle(engine)
    if num_blocks == 12:
        assert engine.stats().preemptions > 0


def test_drawn_tokens_with_rules_are_the_same_alone_and_in_a_mix():
    prompts = ragged(10, seed=4)
    options = [
        Sampling(1.0, seed=index, repetition_penalty=1.2, frequency_penalty=0.2, logit_bias={3: 1.0})
        for index in range(10)
    ]
    together = make_engine(num_blocks=12).generate(prompts, 12, options)
    alone = make_engine()
    assert [alone.generate([prompt], 12, s)[0] for prompt, s in zip(prompts, options, strict=True)] == together
    again = [Sampling(1.0, seed=index) for index in range(10)]
    assert make_engine().generate(prompts, 12, again) != together, "the rules changed nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Sampling(allowed_tokens=lambda output: [] if len(output) == 3 else [1]), "leave no token to choose"),
        (Sampling(allowed_tokens=lambda output: [1][len(output) // 3]), "TypeError"),
        (Sampling(stop=("Z",), logit_bias={11: 1e9}), "could not be decoded"),
    ],
)
def test_a_request_that_fails_leaves_the_others(options, message):
    def fragile(tokens):
        if tokens.count(11) > 1:
            raise ValueError("token 11")
        return spell(tokens)

    engine = make_engine()
    engine._decode = fragile
    good = engine.stream([[1, 2, 3]], 10)
    arrived = [next(good)[1]]
    with pytest.raises(KvpassError, match=rf"prompts\[1\] after \d new tokens: .*{message}"):
        engine.generate([[4, 5], [6, 7]], 10, [Sampling(), options])
    assert arrived + [token for _, token in good] == naive([1, 2, 3], 10)
    check_idle(engine)


def test_stop_strings_need_a_tokenizer_and_tokens_of_it_are_returned():
    with pytest.raises(ConfigError, match="the engine has no tokenizer"):
        make_engine().generate([[1]], 5, Sampling(stop=("A",)))
    with pytest.raises(InputError, match="tokenizer is a int"):
        decode_of(3)
    whole = naive([1, 2], 20)
    stop = spell(whole[5:8])
    (output,) = engine_with_text().generate([[1, 2]], 20, Sampling(stop=(stop,)))
    assert output == whole[: spell(whole).index(stop) + 3]


def test_logits_without_a_finite_value_are_reported_as_before():
    engine = make_engine()
    engine.module.poison = 1
    with pytest.raises(KvpassError, match="logits with NaN or infinity"):
        engine.generate([[1, 2]], 5, Sampling(logprobs=2, repetition_penalty=2.0))
    check_idle(engine)
    assert torch.tensor(logits_of([1, 2])).isfinite().all()
