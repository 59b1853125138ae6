"""The harness itself: it passes a sound engine, and fails one that forgets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvpass.types import Sampling
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import (
    NEW_TOKENS,
    PROMPT_LENGTHS,
    SEED,
    SHARED_PREFIX,
    Prompts,
    assert_not_blind,
    assert_tokens_equal,
    naive_generate,
    ragged_prompts,
    seen_history,
)


class FakeEngine:
    """Generates with the original model from what `remember` leaves of each prompt."""

    def __init__(self, model: nn.Module, remember: Callable[[list[int]], list[int]]) -> None:
        self.model, self.remember = model, remember

    def generate(self, prompts: Prompts, max_new_tokens: int, sampling: Sampling) -> Prompts:
        return [naive_generate(self.model, self.remember(p), max_new_tokens).tokens for p in prompts]


class IgnoresHistory(nn.Module):
    """Logits that depend on the last token alone: no test of a cache can fail on it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class TwoTokensTied(IgnoresHistory):
    """The two best tokens always have the same logit, up to rounding."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        ahead = torch.full_like(logits[..., :1], 20.0)
        return torch.cat([ahead, ahead - 1e-6, logits[..., 2:]], dim=-1)


class PicksTheSecond(FakeEngine):
    """Takes token 1 where the original takes token 0."""

    def generate(self, prompts: Prompts, max_new_tokens: int, sampling: Sampling) -> Prompts:
        return [[1] * max_new_tokens for _ in prompts]


@pytest.fixture
def model() -> nn.Module:
    return DECODERS["GQA by repeat_interleave"](SEED)


@pytest.fixture
def prompts() -> Prompts:
    return ragged_prompts(VOCAB)


def test_prompts_are_ragged_and_share_a_prefix(prompts: Prompts) -> None:
    assert tuple(len(prompt) for prompt in prompts) == PROMPT_LENGTHS
    assert prompts[2][:SHARED_PREFIX] == prompts[3][:SHARED_PREFIX]
    assert prompts[2][SHARED_PREFIX:] != prompts[3][SHARED_PREFIX : len(prompts[2])]


def test_sound_engine_passes(model: nn.Module, prompts: Prompts) -> None:
    assert_tokens_equal(model, FakeEngine(model, list), prompts)


@pytest.mark.parametrize(
    "remember",
    [
        pytest.param(lambda prompt: prompt[1:], id="loses the first token"),
        pytest.param(lambda prompt: prompt[-8:], id="keeps eight tokens"),
        pytest.param(lambda prompt: [*prompt[:-2], prompt[-2] ^ 1, prompt[-1]], id="spoils one token"),
        pytest.param(lambda prompt: [*prompt[1:-1], prompt[0], prompt[-1]], id="turns the order"),
    ],
)
def test_engine_that_forgets_fails(
    model: nn.Module, prompts: Prompts, remember: Callable[[list[int]], list[int]]
) -> None:
    with pytest.raises(AssertionError, match="the original gives"):
        assert_tokens_equal(model, FakeEngine(model, remember), prompts)


def test_engine_that_stops_early_fails(model: nn.Module, prompts: Prompts) -> None:
    class StopsEarly(FakeEngine):
        def generate(self, prompts: Prompts, max_new_tokens: int, sampling: Sampling) -> Prompts:
            return super().generate(prompts, max_new_tokens - 1, sampling)

    with pytest.raises(AssertionError, match="tokens instead of"):
        assert_tokens_equal(model, StopsEarly(model, list), prompts)


def test_tie_is_told_apart_but_leaves_too_little(prompts: Prompts) -> None:
    tied = TwoTokensTied()
    with pytest.raises(AssertionError, match="ties left only 0 tokens"):
        assert_tokens_equal(tied, PicksTheSecond(tied, list), prompts)


def test_blind_model_is_found_out(prompts: Prompts) -> None:
    blind = IgnoresHistory()
    assert seen_history(blind, prompts[1]) == 0
    with pytest.raises(AssertionError, match="move the logits"):
        assert_not_blind(blind, prompts, seen=0.5)


def test_naive_loop_is_greedy(model: nn.Module, prompts: Prompts) -> None:
    continuation = naive_generate(model, prompts[0], NEW_TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + continuation.tokens]))[0, len(prompts[0]) - 1 : -1]
    assert continuation.tokens == logits.argmax(-1).tolist()
    torch.testing.assert_close(continuation.logits, logits)
