"""Decoders in plain PyTorch, each with a spelling of its own, come out of kvpass with their own tokens."""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

import kvpass
from kvpass.compiler import Recompiler
from kvpass.fx_passes.validation.verify_mass import verify_mass
from kvpass.fx_passes.validation.verify_trees import verify_trees
from tests.decoders.catalogue import DECODERS, UNUSUAL
from tests.decoders.skeleton import VOCAB
from tests.parity.compiled import engine_of, original_of
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, original_logits, ragged_prompts
from tests.parity.paged_logits import paged_logits, tree_logits

pytestmark = pytest.mark.sampled(60, 5)

# A step takes 7 tokens, so that prefill is cut in chunks beside decodes; the pool holds two of the prompts.
TIGHT = kvpass.CacheConfig(block_size=CONFIG.block_size, num_blocks=10, max_batch_tokens=7, max_sequences=2)


@dataclass(frozen=True, eq=False)
class Compiled:
    original: nn.Module
    engine: kvpass.Engine


@pytest.fixture(scope="module", params=DECODERS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return Compiled(original_of(request.param), engine_of(request.param))


def test_same_tokens_as_the_naive_loop_cold_and_with_cached_prefixes(compiled: Compiled) -> None:
    prompts = ragged_prompts(VOCAB)
    compiled.engine.clear_prefix_cache()
    first = assert_tokens_equal(compiled.original, compiled.engine, prompts)
    before = compiled.engine.stats().prefix_hit_tokens
    assert assert_tokens_equal(compiled.original, compiled.engine, prompts) == first
    assert compiled.engine.stats().prefix_hit_tokens > before
    compiled.engine.check_integrity()


def test_same_logits_in_prefill_in_chunks_and_in_decode(compiled: Compiled) -> None:
    prompts = ragged_prompts(VOCAB, seed=1, lengths=(3, 20, 41))
    # a whole prefill beside a chunk; a chunk that ends within a block beside a decode; decodes alone
    paged = paged_logits(compiled.engine, prompts, [(0, 18, 7), (2, 1, 33), (1, 1, 0), (0, 0, 1)])
    for prompt, logits in zip(prompts, paged, strict=True):
        torch.testing.assert_close(
            logits, original_logits(compiled.original, torch.tensor([prompt]))[0], rtol=1e-3, atol=1e-3
        )


def test_each_node_of_a_tree_has_the_logits_of_its_path(compiled: Compiled) -> None:
    prompts = ragged_prompts(VOCAB, seed=3, lengths=(37, 12, 18))
    nodes, parents = [5, 8, 11, 14, 5], [-1, 0, -1, 2, 2]
    tree, *others = tree_logits(compiled.engine, prompts, nodes, parents)
    for node, logits in zip(range(-1, len(nodes)), tree, strict=True):
        path: list[int] = []
        while node >= 0:
            path.insert(0, nodes[node])
            node = parents[node]
        expected = original_logits(compiled.original, torch.tensor([[*prompts[0], *path]]))[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    for prompt, logits in zip(prompts[1:], others, strict=True):
        expected = original_logits(compiled.original, torch.tensor([prompt]))[0, -3:]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    found = verify_trees(compiled.engine.module)
    assert found.passed and len(found.errors) == 2
    if any(spec.value_dim == 0 for spec in compiled.engine.plan.caches):  # latents, which a plain step reads otherwise
        found = verify_mass(compiled.engine.module)
        assert found.passed and len(found.errors) == 5


def test_verification_ran_on_every_site(compiled: Compiled) -> None:
    report = compiled.engine.report
    assert report.verification is not None and report.verification.passed
    assert report.sites and not report.refusals
    assert all(site.error is not None and site.error < 1e-3 for site in report.sites)


def test_same_tokens_when_little_fits_at_once(compiled: Compiled) -> None:
    roomy = compiled.engine
    engine = kvpass.Engine(roomy.module, roomy.plan, TIGHT, roomy.report)
    assert_tokens_equal(compiled.original, engine, ragged_prompts(VOCAB, seed=2))
    engine.check_integrity()


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_spelling_is_right_or_refused(name: str) -> None:
    model = original_of(name)
    try:
        # Without the verification: what the passes accept has to be right by itself.
        engine = kvpass.compile(copy.deepcopy(model), CONFIG, verify=False)
    except kvpass.RefusedError as error:
        assert error.report.refusals
        return
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB))


@cache
def captured_once() -> tuple[nn.Module, Recompiler]:
    """A decoder, and one capture of it for all configurations."""
    model = original_of("GQA by repeat_interleave")
    return model, Recompiler(copy.deepcopy(model))


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_same_tokens_at_any_block_size(block_size: int) -> None:
    model, recompiler = captured_once()
    engine = recompiler.compile(kvpass.CacheConfig(block_size=block_size, num_blocks=512))
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB))


def test_same_tokens_without_prefix_sharing() -> None:
    model, recompiler = captured_once()
    engine = recompiler.compile(kvpass.CacheConfig(num_blocks=64, prefix_sharing=False))
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB))
    assert engine.stats().prefix_hit_tokens == 0


def test_same_tokens_without_verification() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED)
    engine = kvpass.compile(copy.deepcopy(model), CONFIG, verify=False)
    assert engine.report.verification is None
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB))
