"""The engine: token ids in, new token ids out, over one compiled module and one block pool.

All calls on one engine, interleaved, from several threads or from asyncio tasks, put their requests into one scheduler.
Whoever waits for a token computes the next step, and a step advances everybody's requests; or a thread does, see
:meth:`Engine.serving`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager, closing
from copy import deepcopy
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.engine.cache_handle import CacheHandle, make_moves, open_disk, shares_prefixes
from kvpass.engine.draft_checks import check_drafter
from kvpass.engine.driving import Driver
from kvpass.engine.exports import Exports
from kvpass.engine.handle import Handle
from kvpass.engine.request import News, Request
from kvpass.engine.settling_module import SettlingModule, make_wide_blocks
from kvpass.engine.step_loop import StepLoop
from kvpass.engine.step_module import StepModule, weighing_module
from kvpass.engine.text_calls import TextCalls
from kvpass.engine.weights_watch import WeightsWatch
from kvpass.errors import InputError
from kvpass.report import RewriteReport
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.capacity import allocate_caches, bytes_per_block, divide_memory
from kvpass.runtime.pool.state_slots import StateSlots, allocate_states
from kvpass.runtime.prefix.eviction import POLICIES
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.sampling.beam_search import Beam, EarlyStopping, make_search
from kvpass.runtime.schedule.latency import Latencies
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.schedule.stats import EngineStats, gather_stats
from kvpass.runtime.sequences.requests import make_samples, make_sequences, set_service
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.speculation.speculation import Drafter, Speculator
from kvpass.types import CachePlan, Sampling

GREEDY = Sampling()


class Engine(TextCalls, Exports):
    """Generates with a compiled module; made by :func:`kvpass.compile`.

    Attributes:
        module: the paged module, for those who bring their own scheduler.
        plan: what the module's caches are.
        config: how the cache is stored and how much of it there is.
        report: what the rewrite did, and how it was proven.
        cache: what is kept for reuse: pin it, drop it, save it.
    """

    def __init__(
        self,
        module: StepModule,
        plan: CachePlan,
        config: CacheConfig,
        report: RewriteReport,
        eos_token_ids: tuple[int, ...] = (),
        tokenizer: Any = None,
        draft: Drafter | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self.module = module
        self.plan = plan
        self.config = config
        self.report = report
        room = self._room = divide_memory(plan, config, module.device)
        caches = allocate_caches(plan, room.num_blocks, module.device, room.wide_blocks)
        self._eos_token_ids = eos_token_ids
        self._pool = BlockPool(room.num_blocks, plan.block_size, config.scrub)
        windows, policy = plan.group_windows, POLICIES[config.eviction]()
        prefix_cache = PrefixCache(self._pool, windows, policy) if shares_prefixes(plan, config) else None
        self._wide = make_wide_blocks(plan, room, self._pool, config.scrub)
        self._moves = moves = make_moves(module, plan, config, caches, self._pool, prefix_cache, self._wide)
        self._scheduler = Scheduler(
            self._pool,
            prefix_cache,
            room.max_batch_tokens,
            room.max_sequences,
            windows,
            moves if config.host_bytes else None,
            forgetting=config.forgetting,
            prefix=plan.prefix,
            slots=StateSlots(room.state_slots) if plan.states else None,
        )
        states = allocate_states(plan, room.state_slots, module.device)
        module = module if self._wide is None else SettlingModule(module, plan, self._wide)
        weighing = weighing_module(self.module, config)
        self._loop = StepLoop(module, plan, caches, self._scheduler, moves, weighing, states)
        reopened = partial(open_disk, self.module, plan, config)
        self.cache = CacheHandle(plan, prefix_cache, moves, self._loop.exclusive, reopened)
        guard, start_over = getattr(self.module, "guard", None), self._scheduler.start_over
        self._weights = WeightsWatch(guard, self._loop, start_over, self.cache.forget_weights)
        self._driver = Driver(self._loop)
        self._closed = False
        self.speculate(draft)

    def __repr__(self) -> str:
        used, state = f"{self._pool.num_used} of {self._pool.num_blocks} blocks", ", closed" if self._closed else ""
        return f"<kvpass.Engine: {len(self.report.sites)} attentions, {used} in use{state}>"

    @property
    def caches(self) -> Ordered[tuple[Tensor, Tensor]]:
        """Key and value tensors of each cache, in the order of the plan; none once the engine was closed."""
        return self._loop.caches

    def generate(
        self,
        prompts: Ordered[Ordered[int]],
        max_new_tokens: int,
        sampling: Sampling | Ordered[Sampling] = GREEDY,
        on_token: Callable[[int, int], object] | None = None,
        *,
        n: int = 1,
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
            n: how many samples to continue each prompt with, which is computed once. Sample ``i`` of prompt ``p`` is
                at ``p * n + i`` of what comes back, and that is its index for ``on_token``. Its seed is
                :func:`kvpass.sample_seed` of that of its prompt: alone with that seed it has the same tokens.

        Raises:
            InputError: if a prompt, ``max_new_tokens`` or ``n`` cannot be used, before anything is computed.
            ConfigError: if an option of ``sampling`` cannot be used.
            CapacityError: if the pool is too small for one of the requests even alone.
            KvpassError: if the model gives logits with NaN or infinity, or a function in ``sampling`` fails.
        """
        if on_token is not None and not callable(on_token):
            raise InputError(f"on_token={on_token!r} cannot be called: give a function of an index and a token")
        requests = self._prepare(prompts, max_new_tokens, sampling, n)
        with closing(self._driver.stream(requests)) as tokens:
            for index, token in tokens:
                if on_token is not None:
                    on_token(index, token)
        return [request.sequence.output for request in requests]

    def stream(
        self,
        prompts: Ordered[Ordered[int]],
        max_new_tokens: int,
        sampling: Sampling | Ordered[Sampling] = GREEDY,
        *,
        n: int = 1,
    ) -> Generator[tuple[int, int], None, None]:
        """Continue every prompt, and yield ``(index of the prompt, token)`` for each token as it comes.

        The tokens of one prompt come in order, those of several interleaved. Arguments and errors are those of
        :meth:`generate`; input is checked at the call, computing starts with the first token asked for. To stop
        early, leave the loop and call ``close()`` on the generator (which happens by itself once nothing refers to
        it): its requests are dropped and their blocks given back.
        """
        return self._driver.stream(self._prepare(prompts, max_new_tokens, sampling, n))

    def submit(
        self,
        prompt: Ordered[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        tenant: str = "",
        n: int = 1,
    ) -> Handle:
        """Queue one prompt, and return at once; requests may come in while others run, from any thread or task.

        Args:
            prompt: token ids.
            max_new_tokens: most new tokens.
            sampling: how tokens are chosen.
            priority: requests with a larger number are served first, but for those that have waited long; -100 to 100.
            deadline: seconds from now after which the request is ended with the tokens that have come; looked at
                whenever a step is chosen.
            namespace: blocks are shared with requests of the same namespace only.
            tenant: on whose behalf it is; tenants get equal shares of the engine.
            n: how many samples to continue the prompt with, which is computed once; see
                :attr:`kvpass.Handle.samples`. Their seeds follow from that of ``sampling`` by
                :func:`kvpass.sample_seed`: alone with its seed, each has the same tokens.

        Raises:
            InputError: if an argument cannot be used, or the engine was closed.
            ConfigError: if an option of ``sampling`` cannot be used.
            CapacityError: if the pool is too small for the request even alone.
        """
        sequences = make_samples(prompt, max_new_tokens, sampling, n, self.plan, self._eos_token_ids, self._decode)
        set_service(sequences, priority, deadline, namespace, tenant)
        self._check(sequences)
        requests = [Request(sequence, 0, News(pending=1)) for sequence in sequences]
        handles = [Handle(request, self._loop, self._driver, self._decode) for request in requests[1:]]
        first = Handle(requests[0], self._loop, self._driver, self._decode, tuple(handles))
        self._loop.submit(requests)
        return first

    def beam_search(
        self,
        prompt: Ordered[int],
        max_new_tokens: int,
        *,
        beams: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        eos_token_ids: Collection[int] | None = None,
        namespace: str = "",
    ) -> list[Beam]:
        """The likeliest outputs of a prompt, the best first, as ``generate(num_beams=...)`` of transformers finds them.

        Beams are forks: they share the blocks that they have in common. Other requests run beside them.

        Args:
            prompt: token ids.
            max_new_tokens: most new tokens of an output.
            beams: beginnings that are followed at once, and outputs that come back.
            length_penalty: scores are log-probabilities over the length to the power of this.
            early_stopping: True ends once there are ``beams`` outputs; False once the likeliest beam, as long as it is,
                is no better than the worst of them; "never" once none could become better.
            eos_token_ids: tokens that end an output; by default the model's.
            namespace: blocks are shared with requests of the same namespace only.

        Raises:
            InputError: if an argument cannot be used, or the engine was closed.
            CapacityError: if the pool is too small for one output even alone.
            KvpassError: if the model gives logits with NaN or infinity.
        """
        sampling = Sampling(ignore_eos=True)
        (root,) = sequences = make_samples(prompt, max_new_tokens, sampling, 1, self.plan, ())
        set_service(sequences, 0, None, namespace, "")
        self._check(sequences)
        ends = self._eos_token_ids if eos_token_ids is None else eos_token_ids
        search = make_search(root, self.plan, beams, length_penalty, early_stopping, ends)
        self._driver.complete(Request(root, 0, News(pending=1), search=search))
        if not search.is_done:
            raise InputError("the engine was closed while it searched")
        return search.found

    @property
    def drafter(self) -> Drafter | None:
        """Who proposes tokens for speculative decoding; None while it is off."""
        speculator = self._loop.speculator
        return None if speculator is None else speculator.drafter

    def speculate(self, drafter: Drafter | None) -> None:
        """Have ``drafter`` propose tokens, several of which are verified in one step; None turns it off.

        The output is that of plain decoding: equal tokens for greedy requests and for seeded ones, up to rounding where
        two tokens are equally likely. Requests with penalties, ``logit_bias``, ``allowed_tokens`` or ``logprobs`` are
        decoded plainly. Nothing is proposed while it does not pay, by the engine's own times.

        Args:
            drafter: a :class:`kvpass.PromptLookup`, a :class:`kvpass.DraftEngine`, or anything with their methods. One
                that proposes several continuations at once, a tree, has the model checked for that first.

        Raises:
            ConfigError: if it cannot draft for this engine.
            VerificationError: if the model gives other logits for tokens in a tree.
        """
        if drafter is not None:
            check_drafter(drafter, self.module, self.plan, self.config, self.report)
        check = getattr(drafter, "check_for", None)
        if check is not None:
            check(self)
        with self._loop.exclusive():
            self._loop.speculator = None if drafter is None else Speculator(drafter, self.plan.vocab_size)

    def continue_sequences(self, sequences: list[Sequence]) -> list[list[int]]:
        """New tokens of sequences that may have some output already; of one that fails, those before."""
        news = News(pending=len(sequences))
        requests = [Request(sequence, 0, news, sequence.num_output) for sequence in sequences]
        before = [sequence.num_output for sequence in sequences]
        self._weights.check()
        try:
            self._loop.submit(requests)
            self._driver.wait(news, lambda: news.pending == 0)
        finally:
            self._loop.cancel(requests)
        return [sequence.output_from(count) for sequence, count in zip(sequences, before, strict=True)]

    def has_room_for(self, tokens: int) -> bool:
        """Whether the pool could hold so many tokens of one sequence if nothing else ran."""
        return self._pool.blocks_for(tokens) <= self._pool.num_blocks

    def serving(self) -> AbstractContextManager[None]:
        """Have a thread compute while the ``with`` block runs, so that requests advance though nobody waits for them.

        Those who wait meanwhile only wait. If a step fails there, the requests that took part in it fail with
        :class:`kvpass.KvpassError`, the cause chained. What is under way when the block is left goes on when somebody
        waits for it. Blocks may be nested and entered from several threads; one thread serves.
        """
        if self._closed:
            raise InputError("the engine was closed: compile the model again")
        return self._driver.serving()

    def step(self) -> bool:
        """Compute one step for all requests under way; False if there are none.

        For who wants to drive the engine: whoever waits for a token does so anyway.
        """
        with self._loop.computing():
            if not self._loop.requests:
                return False
            self._loop.step()
            return True

    def stats(self) -> EngineStats:
        """Figures of now and so far."""
        with self._loop.exclusive():
            tiers, size = self._moves.tier_counts, bytes_per_block(self.plan)
            other = self._room.wide_bytes + self._room.state_bytes
            return gather_stats(self._pool, self._scheduler, self._loop.latencies, tiers, size, other)

    def latencies(self) -> Latencies:
        """How long tokens took so far, as histograms; a copy."""
        with self._loop.exclusive():
            return deepcopy(self._loop.latencies)

    def clear_prefix_cache(self) -> None:
        """Forget all prefixes kept for reuse. Requests under way go on undisturbed."""
        with self._loop.exclusive():
            self._scheduler.clear_prefix_cache()

    def weights_changed(self) -> None:
        """Say that parameters or buffers were changed in place, so that nothing of before is reused.

        The engine sees most changes by itself when it is next asked for tokens: all that PyTorch counts, and those
        through ``.data`` that change a small tensor, or a large one in many places. To be called after one that changes
        few entries of a large tensor through ``.data``, or that is made while requests are under way. What is kept for
        reuse is forgotten, on the device and in host memory; on disk it stays, for engines with the weights of before.
        Requests under way keep the tokens that they have, and their text so far is computed again with the new weights.

        Raises:
            WeightsChangedError: if the value of one of them decided something when the model was compiled.
        """
        self._weights.forget()

    def check_integrity(self) -> None:
        """Assert every invariant of pool, prefix cache and scheduler.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        with self._loop.exclusive():
            self._scheduler.check_integrity()
            if self._wide is not None:
                self._wide.check_integrity()

    def close(self) -> None:
        """Cancel all requests, end the thread that serves, and give the caches' memory back. Can be done twice.

        Iterating over a handle, or waiting for its result, then ends with the tokens that had come. The engine takes
        no more requests.
        """
        self._closed = True
        self._driver.stop()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(
        self, prompts: Ordered[Ordered[int]], max_new_tokens: int, sampling: Sampling | Ordered[Sampling], n: int
    ) -> list[Request]:
        """The requests of one call, checked, in the order of its prompts."""
        sequences = make_sequences(prompts, max_new_tokens, sampling, self.plan, self._eos_token_ids, self._decode, n)
        self._check(sequences)
        news = News(pending=len(sequences), arrived=deque())
        return [Request(sequence, index, news) for index, sequence in enumerate(sequences)]

    def _check(self, sequences: list[Sequence]) -> None:
        if self._closed:
            raise InputError("the engine was closed: compile the model again")
        for sequence in sequences:
            self._scheduler.check_fits(sequence)
        self._weights.check()
