"""What cannot be used is refused with a clear error, and the engine goes on as before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import DIM, MAX_LENGTH, VOCAB
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, ragged_prompts

# --- models --------------------------------------------------------------------------------------------------------


def gpt() -> nn.Module:
    return DECODERS["GPT-2 with a tril buffer slice"](SEED)


def in_training_mode() -> nn.Module:
    return gpt().train()


def with_a_part_in_training_mode() -> nn.Module:
    model = gpt()
    model.h[1].mlp.train()
    return model


def with_a_part_elsewhere() -> nn.Module:
    model = gpt()
    model.h[1].to("meta")
    return model


def without_weights() -> nn.Module:
    return gpt().to("meta")


class BranchesOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.inner(input_ids)
        return logits if logits.sum() > 0 else -logits


class DemandsMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()

    def forward(self, input_ids: Tensor, encoder_states: Tensor) -> Tensor:
        return self.inner(input_ids)


class ReturnsText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()

    def forward(self, input_ids: Tensor) -> str:
        return str(self.inner(input_ids).shape)


class LogitsOfAllTokensTogether(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).mean(1)


class TakesFloats(nn.Module):
    """Wants embeddings where token ids belong."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "gpt2", "Module, not a str"),
        (lambda: gpt, "Module, not a function"),
        (in_training_mode, r"training mode.*eval\(\)"),
        (with_a_part_in_training_mode, r"h\.1\.mlp is in training mode"),
        (with_a_part_elsewhere, r"several devices \(cpu, meta\)"),
        (without_weights, "meta"),
        (lambda: DemandsMore().eval(), "encoder_states"),
        (lambda: ReturnsText().eval(), "returns str"),
    ],
    ids=[
        "text",
        "function",
        "training mode",
        "part in training mode",
        "mixed devices",
        "meta device",
        "demands more",
        "returns text",
    ],
)
def test_model_that_cannot_be_used(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(kvpass.InputError, match=words):
        kvpass.compile(make(), CONFIG)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (BranchesOnData, "data-dependent"),
        (LogitsOfAllTokensTogether, r"logits \[batch, length, vocabulary\]"),
        (TakesFloats, "could not capture the model"),
    ],
)
def test_model_that_cannot_be_captured_is_refused(make: type[nn.Module], words: str) -> None:
    with pytest.raises(kvpass.RefusedError, match=words) as caught:
        kvpass.compile(make().eval(), CONFIG)
    assert [refusal.pass_name for refusal in caught.value.report.refusals] == ["capture"]


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 5),
        torch.zeros(5, dtype=torch.int64),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)),
        (torch.zeros(2, 5, dtype=torch.int64),) * 3,
        "text",
    ],
    ids=["floats", "one dim", "unequal shapes", "three tensors", "text"],
)
def test_example_that_cannot_be_used(example: Any) -> None:
    with pytest.raises(kvpass.InputError, match="example_inputs"):
        kvpass.compile(DECODERS["position_ids optional"](SEED), CONFIG, example_inputs=example)


def test_position_ids_for_a_model_that_takes_none() -> None:
    ids = torch.zeros(2, 11, dtype=torch.int64)
    with pytest.raises(kvpass.InputError, match="position"):
        kvpass.compile(gpt(), CONFIG, example_inputs=(ids, ids))


def test_position_ids_that_may_be_given() -> None:
    model = DECODERS["position_ids optional"](SEED)
    ids = torch.zeros(2, 11, dtype=torch.int64)
    engine = kvpass.compile(copy.deepcopy(model), CONFIG, example_inputs=(ids, torch.arange(11).repeat(2, 1)))
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB))


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> kvpass.Engine:
    return kvpass.compile(gpt(), CONFIG)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1, 2], []], r"prompts\[1\] is empty"),
        ([], "prompts is empty"),
        ([1, 2, 3], "flat list"),
        ("def", "text"),
        (["def"], r"prompts\[0\] is text"),
        ([[1, VOCAB]], rf"is {VOCAB}, which is no token id"),
        ([[1, -1]], "is -1, which is no token id"),
        ([[1, 2.0]], "whole numbers"),
        ([[1, True]], "whole numbers"),
        ([[[1, 2]]], "whole numbers"),
        (torch.ones(2, 3, dtype=torch.int64), "Tensor"),
    ],
    ids=[
        "empty prompt",
        "no prompts",
        "flat list",
        "text",
        "list of text",
        "id past the vocabulary",
        "negative id",
        "float",
        "bool",
        "nested",
        "tensor of two dims",
    ],
)
def test_prompt_that_cannot_be_used(engine: kvpass.Engine, prompts: Any, words: str) -> None:
    with pytest.raises(kvpass.InputError, match=words):
        engine.generate(prompts, max_new_tokens=4)
    assert_goes_on(engine)


@pytest.mark.parametrize("count", [0, -3, 2.5, "4", None, True])
def test_number_of_new_tokens_that_cannot_be_used(engine: kvpass.Engine, count: Any) -> None:
    with pytest.raises(kvpass.InputError, match="max_new_tokens"):
        engine.generate([[1, 2, 3]], max_new_tokens=count)
    assert_goes_on(engine)


def test_prompt_longer_than_the_position_table(engine: kvpass.Engine) -> None:
    with pytest.raises(kvpass.InputError, match=f"longest sequence is {MAX_LENGTH}"):
        engine.generate([[1] * (MAX_LENGTH + 1)], max_new_tokens=1)
    assert_goes_on(engine)


def test_new_tokens_past_the_end_of_the_position_table(engine: kvpass.Engine) -> None:
    with pytest.raises(kvpass.InputError, match=f"longest sequence is {MAX_LENGTH}"):
        engine.generate([[1] * (MAX_LENGTH - 8)], max_new_tokens=16)
    assert_goes_on(engine)


def test_position_table_used_to_its_end(engine: kvpass.Engine) -> None:
    prompts = ragged_prompts(VOCAB, lengths=(MAX_LENGTH - 16,))
    assert_tokens_equal(gpt(), engine, prompts)


@pytest.mark.slow
def test_prompt_longer_than_the_pool() -> None:
    engine = kvpass.compile(DECODERS["GQA by repeat_interleave"](SEED), kvpass.CacheConfig(block_size=8, num_blocks=4))
    with pytest.raises(kvpass.CapacityError, match="block"):
        engine.generate([[1, 2, 3], [1] * 64], max_new_tokens=1)
    assert_goes_on(engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 24}, "power of two"),
        ({"block_size": 0}, "power of two"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"memory": "1 parsec"}, "memory"),
        ({"memory": "1GiB", "num_blocks": 4}, "one of them"),
    ],
)
def test_config_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(kvpass.ConfigError, match=words):
        kvpass.CacheConfig(**options)


@pytest.mark.slow
def test_memory_that_holds_no_block() -> None:
    with pytest.raises(kvpass.ConfigError, match="no block"):
        kvpass.compile(gpt(), kvpass.CacheConfig(memory="100B"))


def test_config_of_another_type() -> None:
    with pytest.raises(kvpass.InputError, match="CacheConfig"):
        kvpass.compile(gpt(), {"block_size": 16})


def assert_goes_on(engine: kvpass.Engine) -> None:
    """The pool is sound, nothing is left in it, and the next call is served."""
    engine.check_integrity()
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert [len(output) for output in engine.generate([[5, 6, 7]], max_new_tokens=2)] == [2]
    engine.check_integrity()
