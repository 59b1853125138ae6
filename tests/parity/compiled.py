"""The decoders of the catalogue, built and compiled once per process for all tests that only look at them."""

import copy
from functools import cache

from torch import nn

import kvpass
from tests.decoders.catalogue import DECODERS, UNUSUAL
from tests.parity.harness import CONFIG, SEED


@cache
def original_of(name: str) -> nn.Module:
    """A decoder of the catalogue. Its weights must stay as they are."""
    return {**DECODERS, **UNUSUAL}[name](SEED)


@cache
def engine_of(name: str) -> kvpass.Engine:
    """An engine over a copy of it. Who needs a cold one calls `clear_prefix_cache`."""
    return kvpass.compile(copy.deepcopy(original_of(name)), CONFIG)
