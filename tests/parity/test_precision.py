"""Weights in half precision: the engine's tokens are as good as the original's own.

Exact equality is not asked for: a step over T flattened tokens rounds otherwise than a pass over `[B, S]`. The
original, run on what the engine generated, must hold each of its tokens for the best, or for as good as the best. Where
tokens are routed to experts, rounding may send one to another expert, which moves its logits by any amount: there most
tokens must be the original's.
"""

import copy

import pytest
import torch
from torch import nn

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.parity.compiled import engine_of
from tests.parity.harness import CONFIG, NEW_TOKENS, SEED, Prompts, original_logits, ragged_prompts

AGREEMENT = 0.85  # share of tokens that are the original's best
# Rounding of the logits, in units of their spread, that a token other than the best is forgiven.
ROUNDING = {torch.bfloat16: 0.2, torch.float16: 0.05}
ROUTED = ("experts, dense",)

NAMES = (
    "GPT-2 with a tril buffer slice",
    "GQA by repeat_interleave",
    "full of finfo.min, triu, added",
    "rotary table by position ids",
    "ALiBi from aranges",
    "band of triu and tril, rotary",
    "nn.MultiheadAttention without weights",
    "experts, dense",
)
CASES = [(name, torch.bfloat16) for name in NAMES] + [(name, torch.float16) for name in NAMES[:3]]
FAMILIES = [("llama", torch.bfloat16), ("gemma3_text", torch.bfloat16), ("gpt2", torch.float16)]


def assert_plausible(
    original: nn.Module, outputs: Prompts, prompts: Prompts, dtype: torch.dtype, routed: bool = False
) -> None:
    """Assert that the original, run over prompt and output, agrees with the output."""
    agreed = total = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = original_logits(original, torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(output)
        behind = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
        close = behind <= ROUNDING[dtype] * logits.std()
        assert routed or close.all(), f"{behind.max():.3f} behind the best token"
        agreed += int((behind == 0).sum())
        total += len(output)
    assert agreed >= AGREEMENT * total, f"only {agreed} of {total} tokens are the original's"


def compile_and_compare(model: nn.Module, vocab_size: int, dtype: torch.dtype, routed: bool = False) -> kvpass.Engine:
    model = model.to(dtype)
    engine = kvpass.compile(copy.deepcopy(model), CONFIG)
    assert engine.report.verification is not None and engine.report.verification.passed
    prompts = ragged_prompts(vocab_size)
    outputs = engine.generate(prompts, NEW_TOKENS, kvpass.Sampling(ignore_eos=True))
    assert_plausible(model, outputs, prompts, dtype, routed)
    engine.check_integrity()
    return engine


@pytest.mark.sampled(11, 2)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_half_precision_decoder(name: str, dtype: torch.dtype) -> None:
    engine = compile_and_compare(DECODERS[name](SEED), VOCAB, dtype, name in ROUTED)
    assert {tensor.dtype for pair in engine.caches for tensor in pair} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), FAMILIES)
def test_half_precision_family(family: str, dtype: torch.dtype) -> None:
    zoo = pytest.importorskip("kvpass.models.zoo", reason="needs transformers")
    compile_and_compare(*zoo.tiny(family, seed=SEED, tie_word_embeddings=False), dtype)


@pytest.mark.slow
def test_half_precision_cache_under_a_float32_model() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED)
    engine = kvpass.compile(copy.deepcopy(model), kvpass.CacheConfig(dtype="bfloat16", block_size=16, num_blocks=64))
    assert {tensor.dtype for pair in engine.caches for tensor in pair} == {torch.bfloat16}
    assert 2 * engine.report.bytes_per_token == engine_of("GQA by repeat_interleave").report.bytes_per_token
    prompts = ragged_prompts(VOCAB)
    assert_plausible(model, engine.generate(prompts, NEW_TOKENS), prompts, torch.bfloat16)


@pytest.mark.slow
def test_float32_cache_under_a_half_precision_model() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED).bfloat16()
    engine = kvpass.compile(copy.deepcopy(model), kvpass.CacheConfig(dtype="float32", block_size=16, num_blocks=64))
    assert {tensor.dtype for pair in engine.caches for tensor in pair} == {torch.float32}
    prompts = ragged_prompts(VOCAB)
    assert_plausible(model, engine.generate(prompts, NEW_TOKENS), prompts, torch.bfloat16)


def test_a_wrong_history_is_not_plausible() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED).bfloat16()
    prompts = ragged_prompts(VOCAB)
    outputs = [[1] * NEW_TOKENS for _ in prompts]
    with pytest.raises(AssertionError, match="behind the best token"):
        assert_plausible(model, outputs, prompts, torch.bfloat16)
