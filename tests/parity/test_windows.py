"""A window bounds the cache: blocks that every cache has passed are given back, and nobody misses them."""

import pytest
import torch

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import SEED, assert_tokens_equal, ragged_prompts

BLOCK = 4
CONFIG = kvpass.CacheConfig(block_size=BLOCK, num_blocks=64, max_batch_tokens=24)
# name: newest tokens that a query looks at where it does not see all, and what the report calls the masks
BOUNDED = {
    "band of triu and tril, rotary": (9, {"sliding window 9"}),
    "chunks of eight": (8, {"chunks of 8"}),
    "window in every other layer": (9, {"sliding window 9", "causal"}),
}


@pytest.fixture(scope="module", params=BOUNDED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(name: str) -> kvpass.Engine:
    return kvpass.compile(DECODERS[name](SEED), CONFIG)


@pytest.mark.sampled(18, 2)
def test_long_sequences_hold_no_more_blocks_than_the_window(name: str, engine: kvpass.Engine) -> None:
    reach, masks = BOUNDED[name]
    assert {site.mask for site in engine.report.sites} == masks
    assert all(site.evidence.startswith("proven for every length") for site in engine.report.sites)
    model = DECODERS[name](SEED)
    held = 0
    engine.clear_prefix_cache()
    prompt = [3, 1, 4]
    tokens = []
    for _, token in engine.stream([prompt], 60):
        tokens.append(token)
        held = max(held, engine.stats().blocks_used)
        # Nothing that is not in use may be looked at: what nobody owns is made NaN, and found by nobody.
        engine.clear_prefix_cache()
        for block, references in enumerate(engine._pool._references):
            if not references:
                for pair in engine.caches:
                    for cache in pair:
                        cache[block] = torch.nan
        engine.check_integrity()
    groups = engine.plan.group_windows
    assert set(groups) == ({reach, None} if "causal" in masks else {reach})
    # The last of 63 tokens is never computed. Those of a window touch one block more where no block begins with them.
    assert held == sum(-(-62 // BLOCK) if window is None else -(-(window + BLOCK - 1) // BLOCK) for window in groups)
    with torch.no_grad():
        for token in tokens:
            logits = model(torch.tensor([prompt]))[0, -1]
            assert int(logits.argmax()) == token
            prompt = [*prompt, token]


@pytest.mark.sampled(18, 2)
def test_shared_prefixes_stay_right_when_their_blocks_were_given_back(name: str, engine: kvpass.Engine) -> None:
    for cache in (cache for pair in engine.caches for cache in pair):
        cache.zero_()
    model = DECODERS[name](SEED)
    prompts = ragged_prompts(VOCAB)
    for _ in range(2):
        assert_tokens_equal(model, engine, prompts)
        engine.check_integrity()
    assert engine.stats().blocks_used == 0
