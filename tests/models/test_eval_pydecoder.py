"""The perplexity functions, on a model whose losses are known."""

import pytest
import torch
from torch import Tensor, nn

from kvpass.models.eval_pydecoder import perplexity, perplexity_of_context, perplexity_of_rereading

VOCAB = 16


class Successor(nn.Module):
    """Sure that id i is followed by i + 1 as far as it sees `needed` tokens; else all ids are alike to it."""

    def __init__(self, needed: int) -> None:
        super().__init__()
        self.needed = needed

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = 100.0 * nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB)
        logits[:, : self.needed - 1] = 0.0
        return logits


IDS = torch.arange(200) % VOCAB


def test_a_sure_model_has_perplexity_one_and_a_blind_one_the_vocabulary() -> None:
    assert perplexity(Successor(needed=1), IDS, 10) == pytest.approx(1.0)
    assert perplexity(Successor(needed=11), IDS, 10) == pytest.approx(VOCAB)


def test_half_of_each_window_blind_gives_the_geometric_mean() -> None:
    assert perplexity(Successor(needed=6), IDS, 10) == pytest.approx(VOCAB**0.5)


def test_a_context_is_exact() -> None:
    assert perplexity_of_context(Successor(needed=4), IDS, 4) == pytest.approx(1.0)
    assert perplexity_of_context(Successor(needed=4), IDS, 3) == pytest.approx(VOCAB)


class Recaller(nn.Module):
    """Sure that the last id is followed by what followed it before; where it is new, all ids are alike to it."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            after: dict[int, int] = {}
            for position, (token, successor) in enumerate(zip(ids, [*ids[1:], 0], strict=True)):
                if token in after:
                    logits[row, position, after[token]] = 100.0
                after[token] = successor
        return logits


def test_a_second_reading_is_sure_unless_the_first_was_shuffled() -> None:
    assert perplexity_of_rereading(Recaller(), torch.arange(2 * VOCAB) % VOCAB, VOCAB) == pytest.approx(1.0)
    assert perplexity_of_rereading(Recaller(), torch.arange(2 * VOCAB) % VOCAB, VOCAB, shuffled=True) > 1e3


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens"):
        perplexity(Successor(needed=1), IDS[:10], 10)
