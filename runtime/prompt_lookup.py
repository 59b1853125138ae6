"""Drafts by looking up: what followed the newest tokens the last time that they occurred in the same sequence."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from kvpass.errors import ConfigError
from kvpass.runtime.sequence import Sequence

NgramSizes = tuple[int, ...]


class PromptLookup:
    """A drafter that copies from the prompt and the output: for text that repeats itself, such as code or quotations.

    Of the n-grams that end a sequence, the longest that occurred before says where to copy from, at its newest
    occurrence. The n-grams of a sequence are indexed as it grows, so a look-up takes the same time at any length.
    Prompt lookup decoding (Saxena, 2023).

    Attributes:
        ngram_sizes: lengths of the n-grams that are looked up, the longest first.
        max_draft: most tokens that are proposed at once.
    """

    cheap = True

    def __init__(self, ngram_sizes: Ordered[int] = (4, 3, 2), max_draft: int = 16) -> None:
        sizes = tuple(ngram_sizes) if isinstance(ngram_sizes, list | tuple) else ()
        if not sizes or not all(_is_count(size) for size in sizes):
            raise ConfigError(f"ngram_sizes={ngram_sizes!r} must be lengths of n-grams, such as (4, 3, 2)")
        if not _is_count(max_draft):
            raise ConfigError(f"max_draft={max_draft!r} is not a whole number of at least 1")
        self.ngram_sizes: NgramSizes = tuple(sorted(set(sizes), reverse=True))
        self.max_draft = max_draft
        self._indexes: dict[Sequence, _Index] = {}

    def propose(self, sequences: Ordered[Sequence], counts: Ordered[int]) -> list[list[int]]:
        """At most ``counts[i]`` tokens that may follow ``sequences[i]``; none where nothing occurred before."""
        return [self._propose(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence that has ended."""
        self._indexes.pop(sequence, None)

    def _propose(self, sequence: Sequence, count: int) -> list[int]:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index(self.ngram_sizes)
        return index.follow(sequence, min(count, self.max_draft))


class _Index:
    """Where each n-gram of one sequence was seen last, the newest token's own aside."""

    __slots__ = ("_places", "_sizes", "_tokens")

    def __init__(self, sizes: NgramSizes) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        # For each size, the index of the token that followed the n-gram.
        self._places: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in sizes)

    def follow(self, sequence: Sequence, count: int) -> list[int]:
        tokens, known = self._tokens, len(self._tokens)
        tokens.extend(sequence.tokens[known:].tolist())
        for size, places in zip(self._sizes, self._places, strict=True):
            # An n-gram is entered once a token follows it, so that the newest one is looked up and not found as itself.
            for end in range(max(known, size), len(tokens)):
                places[tuple(tokens[end - size : end])] = end
        for size, places in zip(self._sizes, self._places, strict=True):
            place = places.get(tuple(tokens[-size:]))
            if place is not None:
                # What is copied may reach its own beginning: a text that repeats itself then goes on doing so.
                period = len(tokens) - place
                return [tokens[place + i % period] for i in range(count)]
        return []


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
