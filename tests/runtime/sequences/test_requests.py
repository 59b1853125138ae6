import numpy as np
import pytest
import torch

from kvpass.errors import ConfigError, InputError
from kvpass.runtime.sequences.requests import make_sequences
from kvpass.types import CachePlan, Sampling

PLAN = CachePlan((), block_size=16, vocab_size=50, max_length=20, max_length_reason="position table of 20 rows")


def make(prompts, max_new_tokens=4, sampling=None, plan=PLAN, eos=()):
    return make_sequences(prompts, max_new_tokens, Sampling() if sampling is None else sampling, plan, eos)


@pytest.mark.parametrize(
    "prompt",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], dtype=np.int16), torch.tensor([1, 2, 3]), [np.int64(1), 2, 3]],
    ids=lambda prompt: type(prompt).__name__,
)
def test_every_list_of_integers_is_a_prompt(prompt):
    (sequence,) = make([prompt])
    assert sequence.tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        (None, "prompts is NoneType: give a list"),
        ("hello", "prompts is text: give a list"),
        (torch.ones(2, 3, dtype=torch.int64), "prompts is Tensor: give a list"),
        ([1, 2], r"flat list of token ids: wrap it, \[prompt\]"),
        ([np.int32(1)], "flat list"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1], torch.ones(0, dtype=torch.int64)], r"prompts\[1\] is empty"),
        (["hello"], r"prompts\[0\] is text: turn it into token ids with the model's tokenizer"),
        ([5.0], r"prompts\[0\] is a float"),
        ([[1, True]], r"prompts\[0\]\[1\] is True of type bool"),
        ([[1, 2.0]], r"prompts\[0\]\[1\] is 2.0 of type float"),
        ([[1, "2"]], r"prompts\[0\]\[1\] is '2' of type str"),
        ([[1, None]], r"prompts\[0\]\[1\] is None of type NoneType"),
        ([torch.ones(3)], r"prompts\[0\]\[0\] is 1.0 of type float"),
        ([torch.ones(3, dtype=torch.bool)], r"prompts\[0\]\[0\] is True of type bool"),
        ([torch.ones(2, 3, dtype=torch.int64)], r"prompts\[0\] has 2 dimensions"),
        ([torch.tensor(3)], r"prompts\[0\] has 0 dimensions"),
        ([[[1, 2]]], r"prompts\[0\]\[0\] is \[1, 2\] of type list"),
        ([[1], [3, -1]], r"prompts\[1\]\[1\] is -1, which is no token id of this model: ids are 0 to 49"),
        ([[50]], r"prompts\[0\]\[0\] is 50, which is no token id"),
        ([[2**80]], "no token id"),
        (
            [[1] * 17],
            r"prompts\[0\] has 17 tokens; with max_new_tokens=4 that makes 21, and the longest sequence is 20",
        ),
        ([[1] * 17], "position table of 20 rows"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(prompts, message):
    with pytest.raises(InputError, match=message):
        make(prompts)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None, "3"])
def test_max_new_tokens_is_a_whole_number_of_at_least_one(count):
    with pytest.raises(InputError, match="max_new_tokens="):
        make([[1]], max_new_tokens=count)


def test_the_longest_sequence_may_be_reached():
    assert make([[1] * 16])[0].max_new_tokens == 4
    assert make([[1] * 99], plan=CachePlan((), 16, 50))[0].num_tokens == 99


@pytest.mark.parametrize(
    ("sampling", "error", "message"),
    [
        ([Sampling()], InputError, "2 prompts and 1 samplings"),
        (0.7, ConfigError, "neither a kvpass.Sampling nor a list"),
        ([Sampling(), None], ConfigError, "neither a kvpass.Sampling nor a list"),
        (Sampling(temperature=-1), ConfigError, "temperature"),
        (Sampling(temperature=float("nan")), ConfigError, "temperature"),
        (Sampling(temperature="hot"), ConfigError, "temperature|wrong type"),
        ([Sampling(), Sampling(top_p=0)], ConfigError, "top_p"),
        (Sampling(top_k=-3), ConfigError, "top_k"),
        (Sampling(min_p=1.5), ConfigError, "min_p"),
        (Sampling(stop_token_ids=(1.0,)), ConfigError, "stop_token_ids"),
        (Sampling(stop_token_ids=3), ConfigError, "stop_token_ids|wrong type"),
        (Sampling(seed=1.5), ConfigError, "seed"),
        (Sampling(repetition_penalty=0), ConfigError, "repetition_penalty=0 must be a positive number"),
        (Sampling(repetition_penalty=10**400), ConfigError, "is not a number"),
        (Sampling(presence_penalty=float("inf")), ConfigError, "presence_penalty=inf must be finite"),
        (Sampling(frequency_penalty="1"), ConfigError, "frequency_penalty='1' is not a number"),
        (Sampling(logit_bias=[(1, 2.0)]), ConfigError, "must map token ids"),
        (Sampling(logit_bias={"a": 1.0}), ConfigError, "logit_bias names 'a', which is no token id"),
        (Sampling(logit_bias={50: 1.0}), ConfigError, "names 50, which is no token id of this model: 0 to 49"),
        (Sampling(logit_bias={-1: 1.0}), ConfigError, "logit_bias names -1"),
        (Sampling(logit_bias={1: float("inf")}), ConfigError, "logit_bias adds inf to token 1"),
        (Sampling(logit_bias={1: float("nan")}), ConfigError, "logit_bias adds nan to token 1"),
        (Sampling(allowed_tokens=[1, 2]), ConfigError, "must be a function from the tokens"),
        (Sampling(logprobs=-1), ConfigError, "logprobs=-1"),
        (Sampling(logprobs=True), ConfigError, "logprobs=True"),
        (Sampling(stop="END"), ConfigError, "stop='END' must be a tuple of strings"),
        (Sampling(stop=("",)), ConfigError, "not empty"),
        (Sampling(stop=("END",)), ConfigError, "the engine has no tokenizer to read its tokens with"),
    ],
)
def test_a_sampling_that_cannot_be_used_is_named(sampling, error, message):
    with pytest.raises(error, match=message):
        make([[1], [2]], sampling=sampling)


def test_end_of_sequence_counts_unless_it_is_ignored():
    samplings = [Sampling(stop_token_ids=(7,)), Sampling(stop_token_ids=(7,), ignore_eos=True)]
    first, second = make([[1], [2]], sampling=samplings, eos=(3, 4))
    assert (first.stop_ids, second.stop_ids) == ({3, 4, 7}, {7})


def test_a_missing_seed_is_drawn_fresh():
    first, second = make([[1], [1]], sampling=Sampling(temperature=1))
    assert first.seed != second.seed
    assert make([[1]], sampling=Sampling(seed=-5))[0].seed == -5
