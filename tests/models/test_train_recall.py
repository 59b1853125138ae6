"""Training of the recall model: its schedule, its batches, and that a short run learns and writes a checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kvpass.models.eval_recall as eval_recall
import kvpass.models.train_recall as training
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig, load
from kvpass.models.recall import QUERY, TASKS, VOCAB_SIZE
from kvpass.models.train_recall import LENGTHS, STEP_TOKENS, mixed_batch, rate


def test_the_rate_rises_holds_and_ends_at_zero() -> None:
    assert 0 < rate(0.0) < rate(0.01) < rate(0.1) == rate(0.4)
    assert rate(0.4) > rate(0.7) > rate(0.9) > rate(1.0) == 0.0


@pytest.mark.parametrize("length", LENGTHS)
def test_a_batch_has_as_many_sequences_of_each_task(length: int) -> None:
    batch = mixed_batch(length, torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == batch.scored.shape == (STEP_TOKENS // length, length)
    half = len(batch.input_ids) // len(TASKS)
    answers = (batch.input_ids == QUERY).long().argmax(1)
    assert batch.scored[:half].sum() > 0 and batch.scored[half:].sum() > 0
    assert not batch.scored[torch.arange(length) <= answers[:, None]].any()


def test_a_run_learns_and_writes_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = PyDecoderConfig(VOCAB_SIZE, d_model=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, d_ff=16)
    monkeypatch.setattr(training, "RECALL_CONFIG", config)
    monkeypatch.setattr(training, "LENGTHS", (16,))
    monkeypatch.setattr(training, "STEP_TOKENS", 512)
    monkeypatch.setattr(eval_recall, "LENGTHS", (16,))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # seconds of compiling, for the same sums
    monkeypatch.setattr(sys, "argv", ["train_recall", "--out", str(tmp_path / "out"), "--minutes", "0.05"])
    threads = torch.get_num_threads()
    try:
        training.main()
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    untrained = PyDecoder(config)
    training.initialise(untrained)
    # One layer cannot look anything up, but it learns soon that keys and marks are never the answer to a key.
    assert loss_of_answers(load(tmp_path / "out")) < loss_of_answers(untrained) - 0.01


def loss_of_answers(model: PyDecoder) -> float:
    batch = mixed_batch(16, torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = F.cross_entropy(
            model(batch.input_ids)[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none"
        )
    return losses[batch.scored[:, 1:]].mean().item()
