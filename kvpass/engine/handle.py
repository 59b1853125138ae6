"""What :meth:`kvpass.Engine.submit` gives back: the tokens of one request, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from kvpass.engine.driving import Driver
from kvpass.engine.request import Request
from kvpass.engine.step_loop import StepLoop
from kvpass.errors import InputError
from kvpass.runtime.sequences.output_text import Decode, decode_after
from kvpass.types import TokenLogprobs


class Handle:
    """One request under way.

    Iterate over it for its tokens as they come, with ``for`` or ``async for``, as often as you like and in as many
    threads and tasks: each iteration begins with the first token. Call :meth:`result` or ``await`` it for all tokens at
    once. Whoever waits computes, unless a thread serves: see :meth:`kvpass.Engine.serving`. A handle that nobody
    refers to any more is cancelled.

    A request that failed raises its error from all of these, after the tokens that came before. If a step raises that
    the waiting thread computes itself, for example for lack of memory, the step is undone and the exception comes out
    here; the request is still under way, and waiting again computes the step again.
    """

    def __init__(
        self,
        request: Request,
        loop: StepLoop,
        driver: Driver,
        decode: Decode | None = None,
        others: tuple[Handle, ...] = (),
    ) -> None:
        self._request = request
        self._loop = loop
        self._driver = driver
        self._decode = decode
        self._others = others

    @property
    def samples(self) -> tuple[Handle, ...]:
        """One handle for each of the ``n`` samples that were asked for; this one is the first.

        Each can be waited for, and cancelled, by itself.
        """
        return (self, *self._others)

    @property
    def seed(self) -> int:
        """By which tokens are drawn: the request's own, or the one that was drawn for it; each sample has its own."""
        return self._request.sequence.seed

    @property
    def tokens(self) -> list[int]:
        """The new tokens that have come so far."""
        return self._tokens_from(0)

    @property
    def num_tokens(self) -> int:
        """How many new tokens have come so far."""
        return self._request.delivered

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self._request.sequence.prompt_length

    @property
    def text(self) -> str:
        """The text of the tokens that have come so far.

        With ``Sampling(stop=...)`` it ends before the stop string, or with it, and until the end it lacks what may turn
        out to begin one.

        Raises:
            InputError: if the engine has no tokenizer.
        """
        if self._decode is None:
            raise InputError(
                "the engine has no tokenizer to read its tokens with: kvpass.compile(model, tokenizer=...)"
            )
        sequence = self._request.sequence
        if sequence.text is not None:
            return sequence.text.whole() if self._request.ended else sequence.text.certain
        return decode_after(sequence.tokens[: sequence.prompt_length].tolist(), self.tokens, self._decode)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One entry for each of ``tokens``; empty unless ``Sampling(logprobs=...)`` asked for them."""
        return self._request.sequence.logprobs[: self._request.delivered]

    @property
    def done(self) -> bool:
        """Whether the request has ended, so that nothing more will come."""
        return self._request.ended

    @property
    def finish_reason(self) -> str | None:
        """``"length"``, ``"stop"``, ``"deadline"``, ``"error"`` or ``"cancelled"``; None before the end."""
        if not self._request.ended:
            return None
        if self._request.failure is not None:
            return "error"
        return self._request.sequence.finish_reason or "cancelled"

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all new tokens, or those that had come before it was cut short.

        Args:
            timeout: seconds to wait at most; the request goes on when they are over.

        Raises:
            TimeoutError: if it has not ended by then.
            KvpassError: if the request failed.
        """
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0
        ):
            raise InputError(f"timeout={timeout!r} is no number of seconds: give one, or None to wait for the end")
        self._driver.wait(self._request.news, lambda: self._request.ended, timeout)
        return self._outcome()

    def cancel(self, *, alone: bool = False) -> None:
        """Drop the request with all its samples, as far as they have not ended, and give their blocks back.

        Never waits: if a step is being computed, it takes effect right after it.

        Args:
            alone: leave the other samples; so it is anyway for all but the first.
        """
        self._loop.cancel([sample._request for sample in ((self,) if alone else self.samples)])

    def __iter__(self) -> Iterator[int]:
        position = 0
        while True:
            self._driver.wait(self._request.news, self._passed(position))
            new = self._tokens_from(position)
            yield from new
            position += len(new)
            if not new and self._request.ended:
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[int]:
        position = 0
        while True:
            await self._driver.wait_async(self._request.news, self._passed(position))
            new = self._tokens_from(position)
            for token in new:
                yield token
            position += len(new)
            if not new and self._request.ended:
                self._outcome()
                return

    def __await__(self) -> Generator[Any, None, list[int]]:
        return self._result_async().__await__()

    def __del__(self) -> None:
        if not self._request.ended:
            self._loop.cancel([self._request])

    async def _result_async(self) -> list[int]:
        await self._driver.wait_async(self._request.news, lambda: self._request.ended)
        return self._outcome()

    def _passed(self, position: int) -> Callable[[], bool]:
        """Whether there are more than ``position`` tokens, or never will be."""
        return lambda: self._request.delivered > position or self._request.ended

    def _tokens_from(self, position: int) -> list[int]:
        delivered = self._request.delivered
        return self._request.sequence.output_from(position)[: max(0, delivered - position)]

    def _outcome(self) -> list[int]:
        if self._request.failure is not None:
            raise self._request.failure
        return self.tokens
