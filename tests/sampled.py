"""What `make test` takes of a long table; the rest is marked slow, and runs with `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], every: int = 2, *, several: bool = False) -> list[Any]:
    """Parameters of a test, or of several arguments each: every so many as they are, the others marked slow."""
    marked = (pytest.param(*(value if several else (value,)), marks=pytest.mark.slow) for value in values)
    return [value if i % every == 0 else slow for i, (value, slow) in enumerate(zip(values, marked, strict=True))]
