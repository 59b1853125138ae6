"""The engine: token ids in, new token ids out, over one compiled module and one block pool.

All calls on one engine, interleaved or from several threads, put their requests into one scheduler. Whoever waits for
a token drives the next step, and a step advances everybody's requests; a lock is held for the step and never while a
caller's code runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Ordered
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.errors import IntegrityError, KvpassError
from kvpass.runtime.batch import build_step_inputs
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.capacity import allocate_caches, bytes_per_block, count_blocks
from kvpass.runtime.output_text import decode_of
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.requests import make_sequences
from kvpass.runtime.sampling import sample
from kvpass.runtime.scheduler import Scheduler
from kvpass.runtime.sequence import Sequence, SequenceState
from kvpass.runtime.stats import EngineStats
from kvpass.types import CachePlan, Sampling, StepInputs

if TYPE_CHECKING:
    from kvpass.report import RewriteReport

GREEDY = Sampling()


class StepModule(Protocol):
    """What the engine needs of a paged module."""

    @property
    def device(self) -> torch.device:
        """Where the step's tensors and the caches have to be."""

    def __call__(self, step: StepInputs, caches: Ordered[tuple[Tensor, Tensor]], /) -> Tensor:
        """Write the caches of the step's tokens and return logits ``[R, V]``."""


@dataclass(eq=False)
class _Call:
    """One call of generate or stream: what has arrived for it, and how many of its requests have not ended."""

    pending: int
    arrived: deque[tuple[int, int]] = field(default_factory=deque)
    failure: str | None = None


@dataclass(eq=False)
class _Request:
    """One prompt of a call, and how many of its new tokens were put into ``call.arrived``."""

    sequence: Sequence
    index: int
    call: _Call
    delivered: int = 0


class Engine:
    """Generates with a compiled module; made by :func:`kvpass.compile`.

    Attributes:
        module: the paged module, for those who bring their own scheduler.
        plan: what the module's caches are.
        config: how the cache is stored and how much of it there is.
        report: what the rewrite did, and how it was proven.
        caches: key and value tensors of each cache, in the order of the plan.
    """

    def __init__(
        self,
        module: StepModule,
        plan: CachePlan,
        config: CacheConfig,
        report: RewriteReport,
        eos_token_ids: tuple[int, ...] = (),
        tokenizer: Any = None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.config = config
        self.report = report
        num_blocks = count_blocks(plan, config)
        self.caches = allocate_caches(plan, num_blocks, module.device)
        self._eos_token_ids = eos_token_ids
        self._decode = None if tokenizer is None else decode_of(tokenizer)
        self._pool = BlockPool(num_blocks, plan.block_size)
        # All caches are indexed by the same blocks: a block can be given back when every one of them has passed it.
        windows = [spec.window for spec in plan.caches]
        window = max((w for w in windows if w is not None), default=None) if None not in windows else None
        prefix_cache = PrefixCache(self._pool, (window,)) if config.prefix_sharing else None
        self._scheduler = Scheduler(self._pool, prefix_cache, config.max_batch_tokens, config.max_sequences, window)
        # Held by whoever touches the scheduler. Not reentrant: see _cancel.
        self._lock = Lock()
        # The requests that have not ended, each in the scheduler or about to be cancelled.
        self._requests: dict[Sequence, _Request] = {}
        # Requests that nobody waits for any more, until the lock is free to drop them.
        self._cancelled: deque[list[Sequence]] = deque()

    def generate(
        self,
        prompts: Ordered[Ordered[int]],
        max_new_tokens: int,
        sampling: Sampling | Ordered[Sampling] = GREEDY,
        on_token: Callable[[int, int], object] | None = None,
    ) -> list[list[int]]:
        """Continue every prompt, and return the new tokens in the order of the prompts.

        A prompt ends after one of its ``stop_token_ids`` or the tokens of a string of ``stop``, after an
        end-of-sequence token of the model unless ``ignore_eos`` is set (all are included), or after
        ``max_new_tokens``.

        Args:
            prompts: lists of token ids, of any number and any lengths; numpy arrays and tensors of one dimension
                will do. What does not fit at once is queued.
            max_new_tokens: most new tokens of each prompt.
            sampling: how tokens are chosen, for all prompts or one for each; by default the most likely token. A
                seed belongs to a request: equal prompts with equal seeds get equal tokens.
            on_token: called with ``(index of the prompt, token)`` for each token as it comes.

        Raises:
            InputError: if a prompt or ``max_new_tokens`` cannot be used, before anything is computed.
            ConfigError: if an option of ``sampling`` cannot be used.
            CapacityError: if the pool is too small for one of the requests even alone.
            KvpassError: if the model gives logits with NaN or infinity, or a function in ``sampling`` fails.
        """
        sequences = self._prepare(prompts, max_new_tokens, sampling)
        with closing(self._run(sequences)) as tokens:
            for index, token in tokens:
                if on_token is not None:
                    on_token(index, token)
        return [sequence.output for sequence in sequences]

    def stream(
        self,
        prompts: Ordered[Ordered[int]],
        max_new_tokens: int,
        sampling: Sampling | Ordered[Sampling] = GREEDY,
    ) -> Generator[tuple[int, int], None, None]:
        """Continue every prompt, and yield ``(index of the prompt, token)`` for each token as it comes.

        The tokens of one prompt come in order, those of several interleaved. Arguments and errors are those of
        :meth:`generate`; input is checked at the call, computing starts with the first token asked for. To stop
        early, leave the loop and call ``close()`` on the generator (which happens by itself once nothing refers to
        it): its requests are dropped and their blocks given back.
        """
        return self._run(self._prepare(prompts, max_new_tokens, sampling))

    def stats(self) -> EngineStats:
        """Figures of now and so far."""
        with self._exclusive():
            pool, counts = self._pool, self._scheduler.counts
            block_bytes = bytes_per_block(self.plan)
            return EngineStats(
                blocks_total=pool.num_blocks,
                blocks_free=pool.num_free,
                blocks_used=pool.num_used,
                blocks_cached=pool.num_cached,
                blocks_shared=pool.num_shared,
                bytes_reserved=pool.num_blocks * block_bytes,
                bytes_peak_used=pool.peak_used * block_bytes,
                waste=counts.unused_slots / max(1, counts.allocated_slots),
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                steps=counts.steps,
                prefill_tokens=counts.prefill_tokens,
                decode_tokens=counts.decode_tokens,
                prefix_hit_tokens=counts.prefix_hit_tokens,
                preemptions=counts.preemptions,
            )

    def clear_prefix_cache(self) -> None:
        """Forget all prefixes kept for reuse. Requests under way go on undisturbed."""
        with self._exclusive():
            self._scheduler.clear_prefix_cache()

    def check_integrity(self) -> None:
        """Assert every invariant of pool, prefix cache and scheduler.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        with self._exclusive():
            self._scheduler.check_integrity()

    def _prepare(
        self, prompts: Ordered[Ordered[int]], max_new_tokens: int, sampling: Sampling | Ordered[Sampling]
    ) -> list[Sequence]:
        sequences = make_sequences(prompts, max_new_tokens, sampling, self.plan, self._eos_token_ids, self._decode)
        for sequence in sequences:
            self._scheduler.check_fits(sequence)
        return sequences

    def _run(self, sequences: list[Sequence]) -> Generator[tuple[int, int], None, None]:
        """Submit ``sequences`` and drive steps until all of them have ended."""
        call = _Call(pending=len(sequences))
        try:
            with self._exclusive():
                for index, sequence in enumerate(sequences):
                    self._requests[sequence] = _Request(sequence, index, call)
                    self._scheduler.add(sequence)
            while True:
                while call.arrived:
                    yield call.arrived.popleft()
                if call.failure is not None:
                    raise KvpassError(call.failure)
                with self._exclusive():
                    # Another call's step may have brought something while this one waited for the lock.
                    if not call.arrived and call.failure is None:
                        if call.pending == 0:
                            return
                        self._step()
        finally:
            self._cancel(sequences)

    def _step(self) -> None:
        """Compute one step for whoever is in the scheduler."""
        step = self._scheduler.schedule()
        if not step.ranges:
            raise IntegrityError("requests are under way and none of them can be scheduled")
        with torch.inference_mode():
            if step.copies:
                source, target = torch.tensor(step.copies, device=self.module.device).t().contiguous()
                torch.ops.kvpass.copy_blocks([tensor for pair in self.caches for tensor in pair], source, target)
            inputs = build_step_inputs(step, self.plan.block_size, self.module.device)
            tokens = sample(self.module(inputs, self.caches), step.sampled)
        self._scheduler.commit(step, [None if token is None else [token] for token in tokens])
        for sequence in step.sampled:
            self._deliver(self._requests[sequence])

    def _deliver(self, request: _Request) -> None:
        """Hand new tokens, and the end if it has come, to the call; what was delivered before is not repeated."""
        sequence, call = request.sequence, request.call
        new = sequence.output_from(request.delivered)
        for token in new:
            call.arrived.append((request.index, token))
        request.delivered += len(new)
        if sequence.state is SequenceState.FINISHED:
            del self._requests[sequence]
            call.pending -= 1
            if sequence.finish_reason == "error":
                call.failure = self._why_failed(request)

    def _why_failed(self, request: _Request) -> str:
        where = f"prompts[{request.index}] after {request.delivered} new tokens"
        if request.sequence.failure is not None:
            return f"{where}: {request.sequence.failure}"
        last = request.sequence.output[-1:]
        if last and last[0] in self.plan.forbidden_tokens:
            return (
                f"the model gave token {last[0]}, the padding token, for {where}: what follows it is not proven; end "
                f"there with Sampling(stop_token_ids=({last[0]},))"
            )
        return (
            f"the model gave logits with NaN or infinity for {where}, so no token could be chosen: run the original "
            f"model on it; if that is finite, the cache dtype may overflow, and bfloat16 or float32 reach further than "
            f"float16"
        )

    def _cancel(self, sequences: list[Sequence]) -> None:
        """Drop the sequences that have not ended, now or as soon as the lock is free.

        The garbage collector may close a stream at any point, in a thread that holds the lock already; so this must
        not wait for it.
        """
        left = [sequence for sequence in sequences if sequence.state is not SequenceState.FINISHED]
        if left:
            self._cancelled.append(left)
            if self._lock.acquire(blocking=False):
                try:
                    self._settle()
                finally:
                    self._lock.release()

    def _settle(self, failed: bool = False) -> None:
        """Put things in order: undo a step that failed, and drop what was cancelled. The lock is held."""
        if self._scheduler.recover() or failed:
            # An interrupt may have come between a step's end and the delivery of its tokens.
            for request in list(self._requests.values()):
                self._deliver(request)
        while self._cancelled:
            for sequence in self._cancelled[0]:
                self._requests.pop(sequence, None)
            self._scheduler.cancel(self._cancelled[0])
            self._cancelled.popleft()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock; on the way in and on the way out, by exception too, things are in order."""
        with self._lock:
            self._settle()
            try:
                yield
            except BaseException:
                self._settle(failed=True)
                raise
            self._settle()
