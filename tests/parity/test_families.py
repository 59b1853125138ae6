"""Families of transformers, handed over as they are, come out of kvpass with their own tokens."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from torch import nn

import kvpass
from tests.parity.harness import (
    CONFIG,
    SEED,
    allocated_bytes_per_token,
    assert_not_blind,
    assert_tokens_equal,
    ragged_prompts,
)

zoo = pytest.importorskip("kvpass.models.zoo", reason="needs transformers")

pytestmark = pytest.mark.sampled(25, 2)

# Of families whose layers are all alike; the others, and one that repeats itself, have the three of the zoo.
TWO_LAYERS = dict.fromkeys(zoo.LAYER_COUNTS, 2)
# family: options without which it repeats itself, or gives logits too close together to compare
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": TWO_LAYERS,
    "llama": TWO_LAYERS,
    "mistral": TWO_LAYERS,  # a window of 24 tokens, shorter than two of the prompts
    "qwen3": TWO_LAYERS,
    "gemma2": {"tie_word_embeddings": False},
    "gemma3_text": {"tie_word_embeddings": False},
    "phi3": TWO_LAYERS,
    "gpt_neox": TWO_LAYERS,
    "falcon": TWO_LAYERS,
    "opt": {},
    "bloom": {"spread": 0.4, **TWO_LAYERS},
    "mpt": TWO_LAYERS,
    "starcoder2": TWO_LAYERS,
    "cohere": {"logit_scale": 1.0, **TWO_LAYERS},
    "olmo2": TWO_LAYERS,
    "mixtral": TWO_LAYERS,
    "gpt_oss": {},
    "deepseek_v3": {},
}
EAGER = ("gpt2", "mistral", "gemma3_text", "mpt", "deepseek_v3")
CASES = [(family, "sdpa") for family in FAMILIES] + [(family, "eager") for family in EAGER]


@dataclass(frozen=True, eq=False)
class Compiled:
    original: nn.Module
    engine: kvpass.Engine
    vocab_size: int


@cache
def compiled_of(family: str, attention: str) -> Compiled:
    model, vocab_size = zoo.tiny(family, attention, seed=SEED, **FAMILIES[family])
    # a copy made before: some models keep masks on the module, or are changed by being exported
    return Compiled(copy.deepcopy(model), kvpass.compile(model, CONFIG), vocab_size)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join(case))
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return compiled_of(*request.param)


def test_same_tokens_as_the_naive_loop_cold_and_with_cached_prefixes(compiled: Compiled) -> None:
    prompts = ragged_prompts(compiled.vocab_size)
    first = assert_tokens_equal(compiled.original, compiled.engine, prompts)
    assert compiled.engine.generate(prompts, 16, kvpass.Sampling(ignore_eos=True)) == first
    compiled.engine.check_integrity()


def test_a_site_for_every_layer(compiled: Compiled) -> None:
    layers = compiled.original.config.num_hidden_layers
    assert len(compiled.engine.report.sites) == layers
    assert len({site.module_path for site in compiled.engine.report.sites}) == layers


def test_bytes_per_token_are_those_of_the_closed_form(compiled: Compiled) -> None:
    engine, config = compiled.engine, compiled.original.config
    wanted = 4 * config.num_hidden_layers * numbers_per_token(config)
    assert allocated_bytes_per_token(engine) == engine.report.bytes_per_token == wanted


def numbers_per_token(config: Any) -> int:
    """What a layer has to remember of a token, from the config: latent attention, or keys and values of its heads."""
    if getattr(config, "kv_lora_rank", None):
        return config.kv_lora_rank + config.qk_rope_head_dim
    heads = config.num_attention_heads
    stored = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    return 2 * stored * (getattr(config, "head_dim", None) or config.hidden_size // heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_history_matters(family: str) -> None:
    model, vocab_size = zoo.tiny(family, seed=SEED, **FAMILIES[family])
    assert_not_blind(model, ragged_prompts(vocab_size), seen=0.7)


@pytest.mark.slow
def test_window_is_shorter_than_the_prompt() -> None:
    compiled = compiled_of("mistral", "sdpa")
    assert compiled.original.config.sliding_window == 24 < max(map(len, ragged_prompts(compiled.vocab_size)))
    masks = {site.mask for site in compiled.engine.report.sites}
    assert masks == {"sliding window 24"}


@pytest.mark.slow
def test_generation_stops_at_the_end_of_sequence_of_the_model() -> None:
    model, vocab_size = zoo.tiny("llama", seed=SEED, **FAMILIES["llama"])
    prompts = ragged_prompts(vocab_size)
    free = compiled_of("llama", "sdpa").engine.generate(prompts, 16, kvpass.Sampling(ignore_eos=True))
    end = free[2][5]
    model.generation_config.eos_token_id = end
    for output, whole in zip(kvpass.compile(model, CONFIG, verify=False).generate(prompts, 16), free, strict=True):
        assert output == (whole[: whole.index(end) + 1] if end in whole else whole)
