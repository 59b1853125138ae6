import numpy as np
import pytest
import torch

from kvpass.runtime.sampling.sampling import probabilities, sample, uniform_numbers
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling


def request(sampling, seed=0, generated=0):
    sequence = Sequence([1], 10**6, sampling, seed)
    for _ in range(generated):
        sequence.append(0)
    return sequence


def brute_force(logits, options):
    """Weights of one row by the definition, in float64."""
    values = logits.double().numpy() / options.temperature
    weights = np.exp(values - values.max())
    weights /= weights.sum()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[: options.top_k if options.top_k > 0 else len(order)]
    if options.top_p < 1:
        reached = np.cumsum(weights[kept])
        kept = kept[: int((reached < options.top_p * reached[-1] * (1 - 1e-9)).sum()) + 1]
    kept = [token for token in kept if weights[token] >= options.min_p * weights.max()]
    result = np.zeros_like(weights)
    result[kept] = weights[kept]
    return result


OPTIONS = [
    Sampling(temperature=1),
    Sampling(temperature=0.3),
    Sampling(temperature=7),
    Sampling(temperature=1, top_k=1),
    Sampling(temperature=1, top_k=5),
    Sampling(temperature=1, top_k=-1, top_p=0.8),
    Sampling(temperature=1, top_k=10**9),
    Sampling(temperature=2, top_k=1500),
    Sampling(temperature=5, top_k=1500, top_p=0.93),
    Sampling(temperature=1, top_p=0.5),
    Sampling(temperature=1, top_p=1e-9),
    Sampling(temperature=50, top_p=0.99),
    Sampling(temperature=1, min_p=0.1),
    Sampling(temperature=1, min_p=1),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 300, 3000, 20_000])
def test_the_options_keep_what_their_definition_says(vocab_size):
    logits = torch.randn(len(OPTIONS), vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    weights = probabilities(logits, OPTIONS)
    for row, options in enumerate(OPTIONS):
        expected = brute_force(logits[row], options)
        assert ((weights[row] > 0).numpy() == (expected > 0)).all(), options
        np.testing.assert_allclose(weights[row].numpy(), expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (Sampling(temperature=1, top_k=3), 3),
        (Sampling(temperature=1, top_p=0.24), 2),
        (Sampling(temperature=1, top_k=6, top_p=0.5), 3),
        (Sampling(temperature=1, min_p=1), 8),
    ],
)
def test_of_equally_likely_tokens_the_lower_ids_are_kept(options, count):
    assert probabilities(torch.zeros(1, 8), [options])[0].nonzero().flatten().tolist() == list(range(count))
    wide = torch.zeros(1, 5000)
    wide[0, 4000] = 1
    assert probabilities(wide, [Sampling(temperature=1, top_k=3)])[0].nonzero().flatten().tolist() == [0, 1, 4000]


def test_greedy_takes_the_first_of_the_most_likely():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(logits, [request(Sampling())] * 2) == [1, 0]
    assert sample(logits.bfloat16(), [request(Sampling())] * 2) == [1, 0]
    assert sample(torch.empty(0, 3), []) == []


@pytest.mark.parametrize("options", [Sampling(temperature=1, top_k=1), Sampling(temperature=1e-30)])
def test_options_that_leave_one_token_are_greedy(options):
    logits = torch.randn(20, 100)
    assert sample(logits, [request(options, seed) for seed in range(20)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_give_none_and_leave_the_others(temperature):
    logits = torch.full((5, 4), -1e9)
    logits[:, 2] = 1
    logits[0, 1] = float("nan")
    logits[1, 1] = float("inf")
    logits[2] = -float("inf")
    logits[3, :2] = -float("inf")
    assert sample(logits, [request(Sampling(temperature))] * 5) == [None, None, None, 2, 2]


def test_a_token_depends_on_its_own_row_only():
    torch.manual_seed(0)
    logits = torch.randn(len(OPTIONS) + 1, 3000)
    requests = [request(options, seed=row, generated=row) for row, options in enumerate([*OPTIONS, Sampling()])]
    alone = [sample(logits[row : row + 1], [requests[row]])[0] for row in range(len(requests))]
    assert sample(logits, requests) == alone
    order = torch.randperm(len(requests)).tolist()
    assert sample(logits[order], [requests[row] for row in order]) == [alone[row] for row in order]


def test_rows_beyond_one_chunk_are_sampled_alike(monkeypatch):
    logits = torch.randn(9, 50)
    requests = [request(Sampling(temperature=1), seed) for seed in range(9)]
    whole = sample(logits, requests)
    monkeypatch.setattr("kvpass.runtime.sampling.sampling._CHUNK_ELEMENTS", 100)
    assert sample(logits, requests) == whole


def test_the_largest_random_number_still_finds_a_token_with_a_weight(monkeypatch):
    monkeypatch.setattr(
        "kvpass.runtime.sampling.sampling.uniform_numbers", lambda seeds, counters: np.full(50, 1 - 2.0**-53)
    )
    logits = torch.randn(50, 300)
    logits[:, 200:] = -float("inf")
    tokens = sample(logits, [request(Sampling(temperature=1))] * 50)
    assert all(100 < token < 200 for token in tokens)


def test_tokens_come_as_often_as_their_probability_says():
    count = 20_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -float("inf"), 0.5])
    chances = torch.softmax(logits.double(), -1).numpy()
    options = Sampling(temperature=1)
    by_seed = sample(logits.expand(count, -1), [request(options, seed) for seed in range(count)])
    one_seed = [request(options, seed=1234) for _ in range(count)]
    for generated, sequence in enumerate(one_seed):
        sequence.num_tokens += generated
    by_counter = sample(logits.expand(count, -1), one_seed)
    for tokens in (by_seed, by_counter):
        found = np.bincount(tokens, minlength=6)
        assert found[4] == 0
        expected = chances * count
        chi_square = ((found - expected) ** 2 / np.maximum(expected, 1)).sum()
        assert chi_square < 20.5  # 4 degrees of freedom, one in 2500


def test_random_numbers_are_uniform_and_unrelated_to_their_neighbours():
    by_seed = uniform_numbers(range(40_000), [3] * 40_000)
    by_counter = uniform_numbers([7] * 40_000, range(40_000))
    for numbers in (by_seed, by_counter):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.006
        counts = np.bincount((numbers * 100).astype(int), minlength=100)
        assert ((counts - 400) ** 2 / 400).sum() < 160
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(by_seed, by_counter)[0, 1]) < 0.02


def test_equal_seeds_give_equal_numbers_and_any_integer_is_a_seed():
    seeds = [0, 1, -1, 2**64 - 1, 2**200 + 5, 5]
    numbers = uniform_numbers(seeds, [0] * 6)
    assert numbers[2] == numbers[3] and numbers[4] == numbers[5]
    assert len(set(numbers.tolist())) == 4
