import pytest
import torch

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.runtime.pool import capacity
from kvpass.types import CachePlan, CacheSpec

SPECS = (CacheSpec("a", 2, 8, 4, "float32", "float32"), CacheSpec("b", 1, 8, 8, "bfloat16", "float32"))
PLAN = CachePlan(SPECS, block_size=16, vocab_size=10)
BLOCK_BYTES = 16 * (2 * (8 + 4) * 4 + (8 * 2 + 8 * 4))


def test_blocks_follow_from_memory():
    assert capacity.bytes_per_block(PLAN) == BLOCK_BYTES
    assert capacity.count_blocks(PLAN, CacheConfig(memory=BLOCK_BYTES * 5 + 1)) == 5
    assert capacity.count_blocks(PLAN, CacheConfig()) == 2**30 // BLOCK_BYTES
    assert capacity.count_blocks(PLAN, CacheConfig(num_blocks=3)) == 3


def test_memory_may_be_a_share_of_what_is_free(monkeypatch):
    assert 2**20 < capacity.free_bytes("cpu") < 2**50
    monkeypatch.setattr(capacity, "free_bytes", lambda device: BLOCK_BYTES * 100)
    for share in (0.25, "25%", " 25.0 %"):
        assert capacity.count_blocks(PLAN, CacheConfig(memory=share)) == 25
    assert capacity.count_blocks(PLAN, CacheConfig(memory=1.0)) == 100


def test_a_device_whose_memory_cannot_be_known_needs_an_amount():
    with pytest.raises(ConfigError, match="on meta cannot be known here: write an amount"):
        capacity.count_blocks(PLAN, CacheConfig(memory=0.5), "meta")


def test_memory_for_less_than_one_block_is_refused_with_the_least_amount():
    with pytest.raises(ConfigError, match=f"at least memory={BLOCK_BYTES}"):
        capacity.count_blocks(PLAN, CacheConfig(memory=BLOCK_BYTES - 1))


def test_a_model_that_remembers_nothing_still_has_blocks():
    plan = CachePlan((), block_size=16, vocab_size=10)
    assert capacity.count_blocks(plan, CacheConfig()) == capacity.BLOCKS_WITHOUT_MEMORY
    assert capacity.allocate_caches(plan, 4, "cpu") == ()


def test_the_tensors_take_what_was_counted_and_can_be_written_in_any_mode():
    with torch.inference_mode():
        caches = capacity.allocate_caches(PLAN, 3, "cpu")
    assert [(tuple(k.shape), tuple(v.shape)) for k, v in caches] == [
        ((3, 2, 16, 8), (3, 2, 16, 4)),
        ((3, 1, 16, 8), (3, 1, 16, 8)),
    ]
    assert sum(t.nbytes for pair in caches for t in pair) == 3 * BLOCK_BYTES
    assert not any(t.is_inference() for pair in caches for t in pair)


def test_memory_that_the_device_does_not_have_is_a_config_error():
    with pytest.raises(ConfigError, match="could not be allocated on cpu: give less memory"):
        capacity.allocate_caches(PLAN, 2**50, "cpu")
