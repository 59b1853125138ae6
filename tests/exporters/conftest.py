"""Engines of the decoders that are exported, compiled once."""

from collections.abc import Callable, Iterator

import pytest

import kvpass
from tests.decoders.catalogue import DECODERS

CONFIG = kvpass.CacheConfig(block_size=8, num_blocks=1)


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[[str], kvpass.Engine]]:
    made: dict[str, kvpass.Engine] = {}

    def engine_of(name: str) -> kvpass.Engine:
        if name not in made:
            made[name] = kvpass.compile(DECODERS[name](6), CONFIG, verify=False)
        return made[name]

    yield engine_of
    for engine in made.values():
        engine.close()
