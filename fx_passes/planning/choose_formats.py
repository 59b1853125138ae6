"""Which format each cache is stored in, from what the config asks of each attention."""

from __future__ import annotations

from collections.abc import Sequence

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.kernels.formats.cache_formats import find_format
from kvpass.types import CacheSpec

AUTO = "auto"


def choose_formats(config: CacheConfig, cache_of: Sequence[int], caches: int) -> tuple[tuple[str, str], ...]:
    """Formats of keys and values of each cache; they may be ``"auto"``.

    Args:
        config: asks for formats by attention.
        cache_of: number of the cache of each attention of the model, in order.
        caches: how many there are.

    Raises:
        ConfigError: if the attentions that share a cache are asked for in different formats.
    """
    chosen: dict[int, tuple[str, str]] = {}
    first: dict[int, int] = {}
    for layer, (index, pair) in enumerate(zip(cache_of, config.formats(len(cache_of)), strict=True)):
        if chosen.setdefault(index, pair) != pair:
            raise ConfigError(
                f"dtype asks for {pair} in layer {layer} and for {chosen[index]} in layer {first[index]}, but these "
                "attentions share one cache: ask for one format"
            )
        first.setdefault(index, layer)
    return tuple(chosen[index] for index in range(caches))


def exact_formats(pair: tuple[str, str]) -> tuple[str, str]:
    """The same pair with ``"auto"`` in place of formats below 16 bits, in which the structure is proven first."""
    keys, values = (AUTO if name == AUTO or find_format(name).bits < 16 else name for name in pair)
    return keys, values


def final_formats(spec: CacheSpec, pair: tuple[str, str]) -> tuple[str, str]:
    """The pair with ``"auto"`` resolved, for a cache that is ``spec`` in exact formats.

    Raises:
        ConfigError: if the cache's heads cannot be stored in their format.
    """
    keys, values = (
        exact if name == AUTO or not dim else name
        for name, exact, dim in zip(
            pair, (spec.key_format, spec.value_format), (spec.key_dim, spec.value_dim), strict=True
        )
    )
    for name, dim in ((keys, spec.key_dim), (values, spec.value_dim)):
        try:
            find_format(name).stored_width(dim)
        except ConfigError as error:
            raise ConfigError(f"the cache of {spec.name} cannot be stored so: {error}") from None
    if (keys == "k4") != (values == "v2"):
        raise ConfigError(
            f"the cache of {spec.name} cannot be stored so: its values are part of the rows of its keys, and k4v2 "
            "stores keys and values apart; name int8 or int4 for this layer"
        )
    return keys, values
