"""Keys and values that are linear maps of something narrower: it is what is stored, and attention gives the same."""

import pytest
import torch

from kvpass.config import CacheConfig
from kvpass.fx_passes.graph import aten, is_call
from tests.fx_passes.latent_spellings import (
    HEADS,
    LATENT,
    LATENTS,
    ROTARY,
    VALUE,
    WIDTH,
    LatentSites,
    Spelling,
    biased_keys,
    biased_values,
    fused,
    of_the_hidden_state,
    rotated,
    softcapped,
    with_sinks,
)
from tests.fx_passes.paged_sites import CONFIG, Rewritten, rewrite


@pytest.fixture(scope="module")
def rewritten() -> Rewritten:
    return rewrite(LatentSites(), CONFIG)


@pytest.mark.slow
@pytest.mark.sampled(24, 2)
@pytest.mark.parametrize("spelling", LATENTS, ids=lambda spelling: spelling.__name__)
def test_attention_over_the_stored_row_is_attention_over_keys_and_values(
    rewritten: Rewritten, spelling: Spelling
) -> None:
    site = list(LATENTS).index(spelling)
    torch.testing.assert_close(rewritten.got[site], rewritten.wanted[site], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spelling", LATENTS, ids=lambda spelling: spelling.__name__)
def test_what_is_stored_is_the_narrowest(rewritten: Rewritten, spelling: Spelling) -> None:
    site = rewritten.plan.sites[list(LATENTS).index(spelling)]
    spec = rewritten.plan.cache_plan.caches[site.cache]
    assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == LATENTS[spelling]


@pytest.mark.slow
def test_what_is_added_is_absorbed_only_where_a_softmax_does_not_see_it() -> None:
    """A softcap sees what is added to keys; with a sink the weights are not 1 together, which values would show."""
    spellings = (fused, fused, biased_keys, biased_keys, biased_values, biased_values)
    found = rewrite(LatentSites(spellings, (softcapped, with_sinks)), CONFIG)
    for got, wanted in zip(found.got, found.wanted, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # a sink is kept in float32
    heads = [found.plan.cache_plan.caches[site.cache].num_kv_heads for site in found.plan.sites]
    assert heads == [1, 1, HEADS, HEADS, 1, HEADS]


def test_the_hidden_state_is_stored_where_the_config_says_so() -> None:
    found = rewrite(
        LatentSites((of_the_hidden_state, rotated)), CacheConfig(dtype="float32", block_size=4, recompute=True)
    )
    for got, wanted in zip(found.got, found.wanted, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    shapes = [(spec.num_kv_heads, spec.key_dim, spec.value_dim) for spec in found.plan.cache_plan.caches]
    assert shapes == [(1, WIDTH, 0), (HEADS, ROTARY, VALUE)], "no matrix brings rotated keys back to the hidden state"


def test_sites_that_read_one_latent_share_its_cache(rewritten: Rewritten) -> None:
    names = [spelling.__name__ for spelling in LATENTS]
    caches = {name: site.cache for name, site in zip(names, rewritten.plan.sites, strict=True)}
    assert caches["fused"] == caches["einsum_by_head"] == caches["in_two_steps"] == caches["grouped"]
    assert caches["fused"] != caches["rotary_first"], "another head of the rotated part"


def test_weights_are_views_of_the_models_own(rewritten: Rewritten) -> None:
    """Nothing is kept beside the model's parameters but places; no key or value is computed any more."""
    own = {p.untyped_storage().data_ptr() for p in rewritten.model.parameters()}
    module = rewritten.paged.module
    assert {p.untyped_storage().data_ptr() for p in module.parameters()} <= own
    added = [b for name, b in module.named_buffers() if name.startswith("_absorbed")]
    assert added and not any(b.is_floating_point() for b in added)
    largest = max((b.numel() for b in module.buffers() if b.is_floating_point()), default=0)
    assert largest < LATENT * HEADS * VALUE, "tables of positions, but no matrix"
    gathered = [n for n in module.graph.nodes if is_call(n, aten.index_select) and n.args[1] == 0]
    assert len(gathered) == 2, "the weights of heads_in_no_order, of keys and of values, are the only ones in no grid"
