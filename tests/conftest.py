"""Marks that are given after the collection: what needs a GPU that is not there, and what `make test` leaves out."""

from collections import Counter
from collections.abc import Sequence

import pytest


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    _sample(items)
    _skip_without_gpu([item for item in items if "gpu" in item.keywords])


def _sample(items: Sequence[pytest.Item]) -> None:
    """Of a table that is marked ``sampled(every, of_rest)`` some entries run always, some in test-all, some in sweeps.

    Each ``every``-th runs always, from the first on; of the others each ``of_rest``-th is slow, and the rest a sweep.
    """
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            function = item.nodeid.partition("[")[0]
            every, of_rest = (*mark.args, 1)[:2]
            turn, place = divmod(seen[function], every)
            if place:
                others = turn * (every - 1) + place - 1
                item.add_marker(pytest.mark.sweep if others % of_rest else pytest.mark.slow)
            seen[function] += 1


def _skip_without_gpu(needing: Sequence[pytest.Item]) -> None:
    if not needing:
        return
    import torch  # costs seconds, which the layout test need not pay

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
