"""Drafts by looking up: what followed the newest tokens the last time that they occurred in the same sequence."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from kvpass.errors import ConfigError
from kvpass.runtime.sequences.draft_tree import DraftTree, merge_paths
from kvpass.runtime.sequences.sequence import Sequence

NgramSizes = tuple[int, ...]


class PromptLookup:
    """A drafter that copies from the prompt and the output: for text that repeats itself, such as code or quotations.

    Of the n-grams that end a sequence, the longest that occurred before says where to copy from, at its newest
    occurrence. The n-grams of a sequence are indexed as it grows, so a look-up takes the same time at any length.
    Prompt lookup decoding (Saxena, 2023).

    With ``branches``, what followed other occurrences is proposed as well where it begins with another token, in a
    tree: the newest of the longest n-gram first, then its older ones, then those of shorter ones.

    Attributes:
        ngram_sizes: lengths of the n-grams that are looked up, the longest first.
        max_draft: most tokens that are proposed at once, in each continuation.
        branches: most continuations that are proposed at once.
    """

    cheap = True

    def __init__(self, ngram_sizes: Ordered[int] = (4, 3, 2), max_draft: int = 16, branches: int = 1) -> None:
        sizes = tuple(ngram_sizes) if isinstance(ngram_sizes, list | tuple) else ()
        if not sizes or not all(_is_count(size) for size in sizes):
            raise ConfigError(f"ngram_sizes={ngram_sizes!r} must be lengths of n-grams, such as (4, 3, 2)")
        for name, value in (("max_draft", max_draft), ("branches", branches)):
            if not _is_count(value):
                raise ConfigError(f"{name}={value!r} is not a whole number of at least 1")
        self.ngram_sizes: NgramSizes = tuple(sorted(set(sizes), reverse=True))
        self.max_draft = max_draft
        self.branches = branches
        self._indexes: dict[Sequence, _Index] = {}

    def propose(self, sequences: Ordered[Sequence], counts: Ordered[int]) -> list[list[int] | DraftTree]:
        """At most ``counts[i]`` tokens that may follow ``sequences[i]``; none where nothing occurred before."""
        return [self._propose(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence that has ended."""
        self._indexes.pop(sequence, None)

    def _propose(self, sequence: Sequence, count: int) -> list[int] | DraftTree:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index(self.ngram_sizes, self.branches)
        tree = merge_paths(index.follow(sequence, min(count, self.max_draft)))
        return tree.tokens if tree.is_chain else tree


class _Index:
    """Where each n-gram of one sequence was seen, the newest token's own aside."""

    __slots__ = ("_branches", "_places", "_sizes", "_tokens")

    def __init__(self, sizes: NgramSizes, branches: int) -> None:
        self._sizes = sizes
        self._branches = branches
        self._tokens: list[int] = []
        # For each size, the indices of tokens that followed the n-gram, the newest first, all different tokens.
        self._places: tuple[dict[tuple[int, ...], list[int]], ...] = tuple({} for _ in sizes)

    def follow(self, sequence: Sequence, count: int) -> list[list[int]]:
        """What followed the newest tokens: continuations that begin with different tokens, the likeliest first."""
        self._take_in(sequence)
        tokens, found = self._tokens, dict[int, int]()
        for size, places in zip(self._sizes, self._places, strict=True):
            for place in places.get(tuple(tokens[-size:]), ()):
                found.setdefault(tokens[place], place)
            if len(found) >= self._branches:
                break
        # What is copied may reach its own beginning: a text that repeats itself then goes on doing so.
        return [
            [tokens[place + i % (len(tokens) - place)] for i in range(count)]
            for place in list(found.values())[: self._branches]
        ]

    def _take_in(self, sequence: Sequence) -> None:
        tokens, known = self._tokens, len(self._tokens)
        tokens.extend(sequence.tokens[known:].tolist())
        for size, places in zip(self._sizes, self._places, strict=True):
            # An n-gram is entered once a token follows it, so that the newest one is looked up and not found as itself.
            for end in range(max(known, size), len(tokens)):
                ngram = tuple(tokens[end - size : end])
                others = [place for place in places.get(ngram, ()) if tokens[place] != tokens[end]]
                places[ngram] = [end, *others[: self._branches - 1]]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
