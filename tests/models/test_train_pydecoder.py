"""Training: the schedule ends at zero, each epoch sees each chunk once, the tokenizer knows every byte."""

from itertools import islice

import pytest
import torch

from kvpass.models.pydecoder import END_OF_TEXT
from kvpass.models.train_pydecoder import (
    CHUNK,
    CHUNKS_PER_BLOCK,
    REPEATED,
    SHORTEST_PERIOD,
    STAGES,
    STEP_TOKENS,
    batches,
    encode,
    rate,
    repeat_some,
    train_tokenizer,
    window_length,
)


def test_the_rate_rises_holds_and_ends_at_zero() -> None:
    assert 0 < rate(0.0) < rate(0.02) < rate(0.1) == 1.0
    assert rate(0.2) == 1.0 > rate(0.6) > rate(0.9) > rate(1.0) == 0.0


def test_windows_grow_to_the_longest() -> None:
    assert [window_length(start) for start, _ in STAGES] == [length for _, length in STAGES]
    assert window_length(1.0) == CHUNK


@pytest.mark.parametrize("length", [length for _, length in STAGES])
def test_an_epoch_sees_each_token_once_with_its_successor(length: int) -> None:
    stream = torch.arange(2 * CHUNKS_PER_BLOCK * CHUNK + 1)
    steps = 2 * CHUNKS_PER_BLOCK * CHUNK // STEP_TOKENS
    epoch = list(islice(batches(stream, lambda: length, torch.Generator().manual_seed(1)), steps))
    assert all(x.shape == (STEP_TOKENS // length, length) and torch.equal(y, x + 1) for x, y in epoch)
    assert torch.equal(torch.cat([x.flatten() for x, _ in epoch]).sort().values, stream[:-1])


def test_the_order_of_the_data_is_a_function_of_the_seed() -> None:
    stream = torch.arange(CHUNKS_PER_BLOCK * CHUNK + 1)

    def first(seed: int) -> torch.Tensor:
        return next(batches(stream, lambda: 512, torch.Generator().manual_seed(seed)))[0]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_a_repeated_window_says_its_own_beginning_and_the_others_stay() -> None:
    length, num_windows = 256, 400
    plain = torch.arange(num_windows * length).view(num_windows, length)
    inputs, targets = repeat_some(plain.clone(), plain + 1, torch.Generator().manual_seed(2))
    changed = 0
    for row in range(num_windows):
        if torch.equal(inputs[row], plain[row]):
            assert torch.equal(targets[row], plain[row] + 1)
            continue
        changed += 1
        period = inputs[row].unique().numel()
        assert SHORTEST_PERIOD <= period <= length // 2
        assert torch.equal(inputs[row], plain[row, 0] + torch.arange(length) % period)
        assert torch.equal(targets[row, :-1], inputs[row, 1:])
    assert 0.5 * REPEATED < changed / num_windows < 1.5 * REPEATED


def test_the_stream_holds_the_texts_in_order_each_with_its_end() -> None:
    texts = ("import os\n", "x = 1\n" * 9)
    tokenizer = train_tokenizer(texts, 300)
    stream = encode(tokenizer, texts, torch.tensor([1, 0]))
    assert tokenizer.decode(stream.tolist(), skip_special_tokens=False) == END_OF_TEXT.join((texts[1], texts[0], ""))
