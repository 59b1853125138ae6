"""``group_caches``: caches that look back equally far share block tables, and groups of them share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvpass.kernels.formats.cache_formats import cache_bytes_per_token, shared_tensors
from kvpass.types import CacheSpec

MOST_GROUPS = 8  # each has block tables of its own in every step
LEAST_SAVING = 0.9  # of the memory of a single group
LONG = 8  # windows that a sequence is long when groupings are compared


def group_caches(caches: Sequence[CacheSpec]) -> tuple[CacheSpec, ...]:
    """The same caches, divided into groups by their windows where that saves memory.

    A block belongs to one group at a time, and holds a token's rows in as many caches as a group has. So the caches of
    one window are cut into pieces of equal size: with 25 caches that have a window and 5 that have none, five groups of
    5 and one. Of the sizes the one is taken with which a sequence of eight windows takes the least memory; a single
    group if that saves less than a tenth.
    """
    known = sorted({spec.window for spec in caches if spec.window is not None})
    single = tuple(replace(spec, group=0) for spec in caches)
    if len({spec.window for spec in caches}) < 2:
        return single
    length = LONG * known[-1]
    largest = max(sum(spec.window == window for spec in caches) for window in (None, *known))
    choices = [_in_pieces(caches, size) for size in range(1, largest + 1)]
    best = min(choices, key=lambda choice: (bytes_of_sequence(choice, length), _count(choice)))
    worth_it = bytes_of_sequence(best, length) <= LEAST_SAVING * bytes_of_sequence(single, length)
    return best if worth_it else single


def bytes_of_sequence(caches: Sequence[CacheSpec], length: int) -> int:
    """Bytes that a sequence of ``length`` tokens keeps from others, up to rounding to blocks."""
    windows: dict[int, list[int]] = {}
    for spec in caches:
        windows.setdefault(spec.group, []).append(length if spec.window is None else min(length, spec.window))
    sizes = dict(zip(shared_tensors(caches), map(cache_bytes_per_token, caches), strict=True))
    return sum(sizes.values()) * sum(map(max, windows.values()))


def _in_pieces(caches: Sequence[CacheSpec], size: int) -> tuple[CacheSpec, ...]:
    """Groups of at most ``size`` caches of one window each; a single group if those are too many."""
    seen: dict[int | None, int] = {}
    numbers: dict[tuple[int | None, int], int] = {}
    found = []
    for spec in caches:
        place = seen.get(spec.window, 0)
        seen[spec.window] = place + 1
        group = numbers.setdefault((spec.window, place // size), len(numbers))
        found.append(replace(spec, group=group))
    return tuple(found) if len(numbers) <= MOST_GROUPS else tuple(replace(spec, group=0) for spec in caches)


def _count(caches: Sequence[CacheSpec]) -> int:
    return len({spec.group for spec in caches})
