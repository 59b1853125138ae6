"""A rewrite that holds for sequences without the padding token is used for no other sequence."""

import pytest
import torch
from torch import nn

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.padding import PAD
from tests.parity.harness import CONFIG, SEED


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return DECODERS["positions counted without padding"](SEED)


@pytest.fixture(scope="module")
def engine(model: nn.Module) -> kvpass.Engine:
    return kvpass.compile(model, CONFIG)


def test_the_condition_stands_in_plan_and_report(engine: kvpass.Engine) -> None:
    assert engine.plan.forbidden_tokens == engine.report.forbidden_tokens == (PAD,)
    assert f"without the token ids {PAD}" in str(engine.report)


def test_a_prompt_with_padding_is_named(engine: kvpass.Engine) -> None:
    with pytest.raises(kvpass.InputError, match=rf"prompts\[1\]\[2\] is {PAD}, the padding token"):
        engine.generate([[4, 5], [6, 7, PAD]], 4)


def test_padding_matters_to_this_model(model: nn.Module) -> None:
    """Else the condition would be idle: padding in the past moves what comes after it."""
    with torch.no_grad():
        padded, moved = model(torch.tensor([[6, PAD, 7], [6, 8, 7]]))[:, -1]
        assert (padded - moved).abs().max() > 1e-2


def test_a_model_that_generates_padding_ends_there(model: nn.Module, engine: kvpass.Engine) -> None:
    bias = model.head.bias
    before = bias[PAD].item()
    try:
        with torch.no_grad():
            bias[PAD] = 100.0  # the engine uses the model's own weights
        assert engine.generate([[4, 5]], 1) == [[PAD]]
        assert engine.generate([[4, 5]], 3, kvpass.Sampling(stop_token_ids=(PAD,))) == [[PAD]]
        with pytest.raises(kvpass.KvpassError, match=rf"gave token {PAD}, the padding token, for prompts\[0\] after 1"):
            engine.generate([[4, 5]], 3)
    finally:
        with torch.no_grad():
            bias[PAD] = before
    engine.check_integrity()
    assert len(engine.generate([[4, 5]], 3)[0]) == 3
