"""One prompt under way, and where those who wait for its tokens learn that some have come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from torch import Tensor

from kvpass.runtime.sampling.beam_search import Choice
from kvpass.runtime.sequences.sequence import Sequence


@dataclass(eq=False)
class News:
    """What has come for one call, and who waits for it.

    Whoever waits appends its waker first and looks for news afterwards; whoever brings news writes it first and calls
    the wakers afterwards. So none is missed, with no lock: the garbage collector may run either in any thread.

    Attributes:
        pending: requests of the call that have not ended.
        arrived: pairs of a request's index and a new token, in the order in which they came; None where nobody takes
            them from here.
        failure: why one of the requests failed.
        wakers: each is called once, then forgotten.
    """

    pending: int
    arrived: deque[tuple[int, int]] | None = None
    failure: Exception | None = None
    wakers: deque[Callable[[], object]] = field(default_factory=deque)

    def wake(self) -> None:
        """Wake everybody who waits."""
        while self.wakers:
            try:
                waker = self.wakers.popleft()
            except IndexError:  # another thread was faster
                return
            waker()


class Search(Protocol):
    """Sequences that go on as somebody else than the sampler says, all of one prompt.

    Attributes:
        sequences: those that are looked at now.
        is_changing: they change hands: if an exception leaves it so, the search cannot go on.
    """

    sequences: list[Sequence]
    is_changing: bool

    @property
    def is_ready(self) -> bool:
        """Whether the next ones can be chosen."""

    def note(self, sequences: Ordered[Sequence], logits: Tensor, /) -> None:
        """Take note of the logits ``[R, V]`` that follow some of them."""

    def note_scored(self, sequence: Sequence, first: int, logits: Tensor, /) -> None:
        """Take note of the logits ``[n, V]`` of its tokens from ``first`` on, where ``scored_from`` asks for them."""

    def choose(self) -> list[Choice]:
        """The next ones; none ends the search."""

    def replace(self, sequences: list[Sequence], choices: Ordered[Choice], /) -> None:
        """Go on with ``sequences``, which have the tokens of ``choices``."""


@dataclass(eq=False)
class Request:
    """One prompt of a call.

    Attributes:
        sequence: its tokens and blocks; the scheduler's from submission to the end.
        index: place of the prompt in its call.
        search: what its beams are; None where it is one sequence from beginning to end.
        news: of the call.
        delivered: new tokens that were made known.
        latest: when the last of them was, or the request was made, by ``time.perf_counter``.
        ended: nothing more will come.
        failure: why it failed.
    """

    sequence: Sequence
    index: int
    news: News
    delivered: int = 0
    latest: float = field(default_factory=perf_counter)
    ended: bool = False
    failure: Exception | None = None
    search: Search | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """What the scheduler has of it."""
        return [self.sequence] if self.search is None else self.search.sequences

    def end(self, failure: Exception | None = None) -> None:
        """Note that nothing more will come, and wake who waits; once only."""
        if self.ended:
            return
        self.failure = failure
        self.ended = True
        self.news.pending -= 1
        self.news.failure = self.news.failure or failure
        self.news.wake()


def wake_in(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """Complete ``future`` from any thread; a loop that has been closed meanwhile waits for nothing."""

    def complete() -> None:
        if not future.done():
            future.set_result(None)

    try:
        loop.call_soon_threadsafe(complete)
    except RuntimeError:
        if not loop.is_closed():
            raise
