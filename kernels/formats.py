"""How keys and values are stored: one row per format, and the arithmetic of what a cache costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvpass.errors import ConfigError
from kvpass.types import CacheSpec, dtype_name


@dataclass(frozen=True)
class CacheFormat:
    """One way to store the keys, or the values, of a cache.

    Attributes:
        name: the row's name in :data:`FORMATS`, as written in a :class:`~kvpass.types.CacheSpec`.
        dtype: dtype of the tensor that holds the elements.
        bits: bits per element.
    """

    name: str
    dtype: torch.dtype
    bits: int

    def bytes_per_token(self, heads: int, dim: int) -> int:
        """Exact bytes that one token takes: ``heads`` rows of ``dim`` elements each."""
        return heads * (dim * self.bits // 8)

    def allocate(self, num_blocks: int, heads: int, block_size: int, dim: int, device: torch.device | str) -> Tensor:
        """Zeros of shape ``[B, heads, P, dim]``. In main memory a block takes room only once it is written."""
        shape = (num_blocks, heads, block_size, dim)
        if torch.device(device).type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=device)
        # numpy leaves zeroed pages to the operating system, where torch.zeros writes them all
        count = num_blocks * heads * block_size * dim * self.dtype.itemsize
        return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(self.dtype).view(shape)


FORMATS: dict[str, CacheFormat] = {
    row.name: row
    for row in (
        CacheFormat("float32", torch.float32, 32),
        CacheFormat("bfloat16", torch.bfloat16, 16),
        CacheFormat("float16", torch.float16, 16),
    )
}


def find_format(name: str) -> CacheFormat:
    """The row called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"cache format {name!r} does not exist: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_for_dtype(dtype: torch.dtype) -> str:
    """Name of the format that stores elements of ``dtype`` unchanged.

    Raises:
        ConfigError: if no format does, as for float64.
    """
    name = dtype_name(dtype)
    if name not in FORMATS:
        raise ConfigError(f"no cache format keeps {name} unchanged: choose one of {', '.join(FORMATS)} as cache dtype")
    return name


def cache_bytes_per_token(spec: CacheSpec) -> int:
    """Exact bytes that one token takes in the cache ``spec``, keys and values together."""
    keys = find_format(spec.key_format).bytes_per_token(spec.num_kv_heads, spec.key_dim)
    values = find_format(spec.value_format).bytes_per_token(spec.num_kv_heads, spec.value_dim)
    return keys + values


def allocate_cache(
    spec: CacheSpec, num_blocks: int, block_size: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The two tensors of one cache, zero-initialised.

    Returns:
        keys ``[B, Hkv, P, D]`` and values ``[B, Hkv, P, Dv]``, each in its format.
    """
    keys = find_format(spec.key_format)
    values = find_format(spec.value_format)
    return (
        keys.allocate(num_blocks, spec.num_kv_heads, block_size, spec.key_dim, device),
        values.allocate(num_blocks, spec.num_kv_heads, block_size, spec.value_dim, device),
    )
