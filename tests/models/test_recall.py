"""Recall and copying: sequences say what they should; the shipped model answers by looking back and by nothing else."""

import json
from itertools import pairwise

import pytest
import torch

from kvpass.models.eval_recall import LENGTHS
from kvpass.models.pydecoder import PyDecoder, load
from kvpass.models.recall import (
    CHECKPOINT,
    COPY,
    FIRST_KEY,
    FIRST_VALUE,
    QUERY,
    RECALL,
    TASKS,
    VOCAB_SIZE,
    TaskBatch,
    accuracy,
    held_out,
)

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model() -> PyDecoder:
    return load(CHECKPOINT)


def sequences(task: str, length: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Tokens and scored positions of some sequences."""
    batch = TASKS[task](8, length, torch.Generator().manual_seed(seed))
    assert batch.input_ids.shape == batch.scored.shape == (8, length)
    return [
        (ids, [i for i, scored in enumerate(row) if scored])
        for ids, row in zip(batch.input_ids.tolist(), batch.scored.tolist(), strict=True)
    ]


@pytest.mark.parametrize("length", [16, 17, 33, 64, 512])
def test_every_key_is_said_once_and_asked_for_once(length: int) -> None:
    for ids, scored in sequences("recall", length, seed=length):
        query = ids.index(QUERY)
        said: dict[int, int] = {}
        for key, value in pairwise(ids[1:query]):
            if key < FIRST_VALUE:
                assert key >= FIRST_KEY and key not in said and FIRST_VALUE <= value < VOCAB_SIZE
                said[key] = value
        asked = ids[query + 1 :: 2]
        assert ids[0] == RECALL and sorted(asked) == sorted(said)
        assert scored == list(range(query + 2, length, 2))
        assert [ids[place] for place in scored] == [said[key] for key in asked]
        # What is neither a key nor its value is noise: a value that belongs to nobody.
        assert all(token >= FIRST_VALUE for token in ids[1:query] if token not in said)


@pytest.mark.parametrize("length", [16, 17, 64, 512])
def test_the_string_is_said_again(length: int) -> None:
    for ids, scored in sequences("copy", length, seed=length):
        start, query = ids.index(COPY) + 1, ids.index(QUERY)
        assert ids[start:query] == ids[query + 1 :] and len(ids[start:query]) >= length // 4
        assert scored == list(range(query + 1, length))
        assert all(token >= FIRST_KEY for token in ids[: start - 1] + ids[start:query])


@pytest.mark.parametrize("task", TASKS)
def test_noise_and_pairs_come_in_random_order(task: str) -> None:
    (first, _), (second, _), *_ = sequences(task, 64)
    assert first != second and sequences(task, 64) == sequences(task, 64) != sequences(task, 64, seed=1)


def test_held_out_sequences_are_the_same_each_time() -> None:
    first, again = held_out("recall", 20, 64), held_out("recall", 20, 64)
    assert torch.equal(first.input_ids, again.input_ids) and first.input_ids.shape == (20, 64)
    assert len({int(row.sum()) for row in first.scored}) > 1, "groups have different numbers of pairs"


def test_a_length_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        TASKS["copy"](1, 15, torch.Generator())


def test_accuracy_counts_answers_alone() -> None:
    batch = TaskBatch(torch.tensor([[1, 2, 3, 0]]), torch.tensor([[False, False, True, True]]))
    logits = torch.zeros(1, 4, 4)
    logits[0, 0, 3] = logits[0, 1, 3] = logits[0, 2, 1] = 1.0  # wrong but not scored, right, wrong
    assert accuracy(logits, batch) == 0.5


def test_the_shipped_model_is_small_and_as_good_as_its_card_says(model: PyDecoder) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 4 * MEGABYTE
    metrics = json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))
    assert min(metrics.values()) >= 0.99
    card = (CHECKPOINT / "MODEL_CARD.md").read_text(encoding="utf-8")
    for length in LENGTHS:
        figures = [f"{100 * metrics[f'{task}_{length}']:.2f} %" for task in TASKS]
        assert f"| {length} | {' | '.join(figures)} |" in card


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_model_answers_from_what_was_said_and_not_otherwise(model: PyDecoder, task: str) -> None:
    batch = held_out(task, 8, 512)
    with torch.no_grad():
        assert accuracy(model(batch.input_ids), batch) >= 0.99
        # The same questions and answers, but what was said before them belongs to another sequence.
        asked = batch.input_ids[:1] == QUERY
        before = torch.arange(512) <= asked.nonzero()[0, 1]
        mixed = torch.where(before, batch.input_ids.roll(1, 0), batch.input_ids)
        first = batch.scored & (torch.arange(512) < asked.nonzero()[0, 1] + 20)
        assert accuracy(model(mixed), TaskBatch(mixed, first)) < 0.2
