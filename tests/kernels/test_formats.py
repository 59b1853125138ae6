"""Cache formats: every row of the table allocates exactly the bytes that it claims."""

from __future__ import annotations

import pytest
import torch

from kvpass.config import CACHE_DTYPES
from kvpass.errors import ConfigError
from kvpass.kernels.formats import (
    FORMATS,
    allocate_cache,
    cache_bytes_per_token,
    find_format,
    format_for_dtype,
)
from kvpass.types import CacheSpec


def spec(key_format: str, value_format: str) -> CacheSpec:
    return CacheSpec("layers.0", 3, 24, 8, key_format, value_format)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_per_token_is_what_one_token_takes(name: str) -> None:
    cache = FORMATS[name].allocate(7, 3, 16, 24, "cpu")
    assert cache.shape == (7, 3, 16, 24)
    assert cache.nbytes == 7 * 16 * FORMATS[name].bytes_per_token(3, 24)


@pytest.mark.parametrize("key_format", FORMATS)
@pytest.mark.parametrize("value_format", FORMATS)
def test_a_cache_takes_exactly_its_bytes_and_starts_as_zeros(key_format: str, value_format: str) -> None:
    cache = spec(key_format, value_format)
    keys, values = allocate_cache(cache, num_blocks=5, block_size=32, device="cpu")
    assert keys.shape == (5, 3, 32, 24)
    assert values.shape == (5, 3, 32, 8)
    assert keys.nbytes + values.nbytes == 5 * 32 * cache_bytes_per_token(cache)
    assert keys.untyped_storage().nbytes() + values.untyped_storage().nbytes() == keys.nbytes + values.nbytes
    assert not keys.any()
    assert not values.any()
    assert keys.is_contiguous()
    assert values.is_contiguous()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_keeps_its_own_dtype_unchanged(name: str) -> None:
    row = FORMATS[name]
    assert row.name == name
    assert row.bits == torch.empty(1, dtype=row.dtype).nbytes * 8
    assert format_for_dtype(row.dtype) == name


def test_every_cache_dtype_of_the_config_is_a_format() -> None:
    assert set(CACHE_DTYPES) - {"auto"} == set(FORMATS)


def test_an_unknown_format_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'int3' does not exist: choose one of float32, bfloat16, float16"):
        find_format("int3")
    with pytest.raises(ConfigError, match=r"int3"):
        cache_bytes_per_token(spec("int3", "float32"))
    with pytest.raises(ConfigError, match=r"no cache format keeps float64 unchanged"):
        format_for_dtype(torch.float64)
