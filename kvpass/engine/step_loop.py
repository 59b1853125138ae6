"""The step loop: who is under way, and the steps that are computed for all of them.

One lock guards the scheduler and is held for a step, never while a caller's code runs; except for what a step itself
asks of the caller, such as which tokens a grammar allows. New requests and cancelled ones are left in queues that need
no lock, and are taken in by whoever holds it next: so neither an event loop nor the garbage collector waits for a step.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from threading import Lock, get_ident

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.engine.failures import step_failed, why_failed
from kvpass.engine.request import Request
from kvpass.engine.settling_module import SettlingModule
from kvpass.engine.step_module import StepModule, WeighingModule
from kvpass.errors import InputError, IntegrityError, KvpassError, KvpassWarning
from kvpass.kernels.row_moves import move_rows
from kvpass.runtime.pool.state_slots import move_states
from kvpass.runtime.schedule.batch import BatchBuilder
from kvpass.runtime.schedule.latency import Latencies
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.runtime.sequences.step import Step, TokenRange
from kvpass.runtime.speculation.accepted_rows import rows_to_move
from kvpass.runtime.speculation.speculation import Speculator
from kvpass.runtime.speculation.verification import choose_tokens
from kvpass.runtime.tiers.block_moves import BlockMoves
from kvpass.types import CachePlan


class StepLoop:
    """Requests in, steps for all of them, tokens delivered.

    Attributes:
        caches: key and value tensors of each cache, in the order of the plan.
        states: tensors of each recurrent state, likewise.
        speculator: proposes tokens that a step computes ahead; None computes none.
        latencies: how long tokens took.
        requests: those that have not ended, each in the scheduler or about to be cancelled.
        on_submit: called, with no lock held, when there is something new to do.
        before_admission: called, with the lock held, before requests are taken in; with whether none is under way.
        before_step: called, with the lock held, before a step is planned.
    """

    def __init__(
        self,
        module: StepModule,
        plan: CachePlan,
        caches: Ordered[tuple[Tensor, Tensor]],
        scheduler: Scheduler,
        moves: BlockMoves,
        weighing: WeighingModule | None = None,
        states: tuple[Tensor, ...] = (),
    ) -> None:
        self._moves = moves
        # Computes the steps where the attention that blocks receive decides what is forgotten.
        self._weighing = weighing
        self._module = module
        self._plan = plan
        self._batches = BatchBuilder(plan.block_size, module.device)
        self.caches: Ordered[tuple[Tensor, Tensor]] = caches
        self.states = states
        self._scheduler = scheduler
        self.speculator: Speculator | None = None
        self.latencies = Latencies()
        self.requests: dict[Sequence, Request] = {}
        # Those of them that are searched with beams.
        self._searching: list[Request] = []
        self.on_submit: Callable[[], object] = lambda: None
        self.before_admission: Callable[[bool], object] = lambda idle: None
        self.before_step: Callable[[], object] = lambda: None
        self._closed = False
        # Held by whoever touches the scheduler. Not reentrant: see cancel.
        self._lock = Lock()
        # Held by whoever waits for the lock for another reason than to compute a step. Those who compute pass through
        # it before each step: else one that computes step after step would hardly let anybody else in.
        self._turnstile = Lock()
        self._holder: int | None = None
        # Both until the lock is free, in the order in which they came.
        self._submitted: deque[Request] = deque()
        self._cancelled: deque[list[Request]] = deque()
        # Sequences of the step that is being computed.
        self._computed: tuple[Sequence, ...] = ()

    @property
    def has_work(self) -> bool:
        """Whether a step would bring somebody further."""
        return bool(self._submitted) or any(not sequence.held for sequence in self.requests)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests whose sequences were checked to fit. Never waits."""
        self._submitted.extend(requests)
        self._settle_if_free()
        self.on_submit()

    def cancel(self, requests: Iterable[Request]) -> None:
        """Drop the requests that have not ended, now or as soon as the lock is free.

        The garbage collector may close a stream at any point, in a thread that holds the lock already; so this must
        not wait for it.
        """
        left = [request for request in requests if not request.ended]
        if left:
            self._cancelled.append(left)
            self._settle_if_free()
            self.on_submit()

    def close(self) -> None:
        """Cancel everything, now and whatever is submitted later, and let go of the caches."""
        self._closed = True
        with self.exclusive():
            self.caches, self.states = (), ()
            self._moves.close()

    def step(self) -> None:
        """Compute one step for whoever is in the scheduler. The lock is held."""
        self.before_step()
        started = drafted = time.perf_counter()
        if self.speculator is not None:
            decoding = self._scheduler.decoding
            if self._searching:
                decoding = [sequence for sequence in decoding if self.requests[sequence].search is None]
            self.speculator.propose(decoding)
            drafted = time.perf_counter()
        step = self._scheduler.schedule()
        for sequence in step.expired:
            self._deliver(self.requests[sequence])
        if not step.ranges:
            if step.expired:
                return
            raise IntegrityError("requests are under way and none of them can be scheduled")
        self._computed = (*(sequence for sequence, _, _ in step.ranges), *step.sampled)
        # A caller's autocast is none of the step's: it would store keys and values of another dtype than was verified.
        with torch.inference_mode(), torch.autocast(self._module.device.type, enabled=False):
            self._moves.flush()
            if step.copies and isinstance(self._module, SettlingModule):
                self._module.copy_blocks(self.caches, step.copies)
            elif step.copies:
                source, target = torch.tensor(step.copies, device=self._module.device).t().contiguous()
                torch.ops.kvpass.copy_blocks([tensor for pair in self.caches for tensor in pair], source, target)
            move_states(self.states, step.state_moves)
            scored = step.scored() if self._searching else []
            inputs = self._batches.build(step, self.states, scored)
            received: NDArray[np.float64] | None = None
            if self._weighing is None:
                logits = self._module(inputs, self.caches)
            else:
                logits, mass = self._weighing.forward_with_mass(inputs, self.caches)
                received = mass.double().cpu().numpy()
            if scored:
                logits = self._note_scored(scored, logits)
            tokens = choose_tokens(logits, step)
            if self._searching:
                tokens = self._note_beams(step, logits, tokens)
            if inputs.tree_mask is not None:
                self._move_rows(step, tokens)
        if self.speculator is not None:
            self.speculator.learn(step, tokens, drafted - started, time.perf_counter() - started)
        self._scheduler.commit(step, tokens, received)
        self._computed = ()
        for sequence in step.sampled:
            self._deliver(self.requests[sequence])

    def _move_rows(self, step: Step, tokens: Ordered[Ordered[int] | None]) -> None:
        """Put the rows of accepted tokens in their places; before the commit, which may share their blocks."""
        moves = rows_to_move(step, tokens, self._plan.block_size)
        if moves is None:
            return
        source, target = torch.from_numpy(moves).to(self._module.device)
        for spec, (keys, values) in zip(self._plan.caches, self.caches, strict=True):
            move_rows(keys, spec.key_format, source[spec.group], target[spec.group])
            move_rows(values, spec.value_format, source[spec.group], target[spec.group])

    def step_for_nobody(self) -> None:
        """As :meth:`step`, where no caller waits whom an exception could reach: it ends the requests of the step."""
        try:
            self._computed = ()
            self.step()
        except BaseException as error:
            concerned = [self.requests[s] for s in {*self._computed} or self.requests if s in self.requests]
            self._settle(failed=True)
            self._drop(concerned, step_failed(error))

    def fail_all(self, error: BaseException) -> None:
        """End all requests because of an error outside of any step."""
        with self._lock:
            while self._submitted:
                request = self._submitted.popleft()
                self.requests[request.sequence] = request
            self._scheduler.recover()
            failure = KvpassError(f"the engine failed between two steps: {error!r}; its cause is chained")
            failure.__cause__ = error
            try:
                self._drop(list(self.requests.values()), failure)
            finally:
                for request in list(self.requests.values()):
                    request.end(failure)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock; on the way in and on the way out, by exception too, things are in order.

        Raises:
            InputError: if this thread holds it already.
        """
        self.check_outside()
        with self._turnstile, self._settled():
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As :meth:`exclusive`, for a step: lets those who wait for another reason go first."""
        self.check_outside()
        with self._turnstile:
            pass
        with self._settled():
            yield

    @contextmanager
    def _settled(self) -> Iterator[None]:
        with self._lock:
            self._holder = get_ident()
            try:
                self._settle()
                try:
                    yield
                except BaseException:
                    self._settle(failed=True)
                    raise
                self._settle()
            finally:
                self._holder = None

    def check_outside(self) -> None:
        """Raise :class:`InputError` where this thread is in a step, and so may not wait for one."""
        if self._holder == get_ident():
            raise InputError(
                "the engine was called from within one of its own steps: a function that it calls there must not wait "
                "for it"
            )

    def _settle_if_free(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self, failed: bool = False) -> None:
        """Put things in order: undo a step that failed, take in what is new, drop what was cancelled."""
        if self._scheduler.recover() or failed:
            # An interrupt may have come between a step's end and the delivery of its tokens.
            for request in list(self.requests.values()):
                self._deliver(request)
        if self._submitted:
            self.before_admission(not self.requests)
        while self._submitted:
            request = self._submitted[0]
            self.requests[request.sequence] = request
            if request.search is not None and request not in self._searching:
                self._searching.append(request)
            if request.sequence.state is SequenceState.NEW:
                self._scheduler.add(request.sequence)
            self._submitted.popleft()
        if self._closed:
            self._drop(list(self.requests.values()))
        while self._cancelled:
            self._drop(self._cancelled[0])
            self._cancelled.popleft()
        for request in list(self._searching):
            self._advance_beams(request)
        self._moves.flush()

    def _drop(self, requests: Ordered[Request], failure: Exception | None = None) -> None:
        """End requests before their time."""
        self._scheduler.cancel([sequence for request in requests for sequence in request.sequences])
        for request in requests:
            self._forget(request)
            request.end(failure)

    def _forget(self, request: Request) -> None:
        for sequence in request.sequences:
            self.requests.pop(sequence, None)
            if self.speculator is not None:
                self._have_forgotten(self.speculator, sequence)
        if request.search is not None and request in self._searching:
            self._searching.remove(request)

    @staticmethod
    def _have_forgotten(speculator: Speculator, sequence: Sequence) -> None:
        try:
            speculator.forget(sequence)
        except Exception as error:  # a drafter of the caller's own; those who wait for the request must not hang for it
            warnings.warn(f"the drafter failed to forget a request: {error!r}", KvpassWarning, stacklevel=2)

    def _note_scored(self, scored: list[TokenRange], logits: Tensor) -> Tensor:
        """Hand out the logits of tokens that were asked for beside the newest ones; gives the others."""
        counts = [end - start for _, start, end in scored]
        parts: list[Tensor] = list(logits.split([len(logits) - sum(counts), *counts]))
        others = parts.pop(0)
        for (sequence, start, end), part in zip(scored, parts, strict=True):
            search = self.requests[sequence].search
            assert search is not None
            search.note_scored(sequence, start, part)
            sequence.scored_from = end
        return others

    def _note_beams(self, step: Step, logits: Tensor, tokens: list[list[int] | None]) -> list[list[int] | None]:
        """Hand the logits of beams to their searches; gives the tokens without theirs, which are chosen later."""
        tokens, first = list(tokens), 0
        rows: dict[Request, list[tuple[int, Sequence]]] = {}
        for place, (sequence, drafted) in enumerate(zip(step.sampled, step.drafted, strict=True)):
            request = self.requests[sequence]
            if request.search is not None and tokens[place] is not None:
                tokens[place] = []
                rows.setdefault(request, []).append((first, sequence))
            first += 1 + drafted
        for request, found in rows.items():
            assert request.search is not None
            request.search.note([sequence for _, sequence in found], logits[[row for row, _ in found]])
        return tokens

    def _advance_beams(self, request: Request) -> None:
        """Go on with the next beams of a search, if those before are all computed."""
        search = request.search
        assert search is not None
        if search.is_changing:
            self._drop([request], KvpassError("a beam search was interrupted while its beams changed: start it again"))
        elif search.is_ready:
            search.is_changing = True
            choices, beams = search.choose(), search.sequences
            if not choices:
                self._drop([request])
                return
            parents = {choice.parent for choice in choices}
            gone = [beam for place, beam in enumerate(beams) if place not in parents]
            self._scheduler.cancel(gone)
            chosen: list[Sequence] = []
            for choice in choices:
                beam = beams[choice.parent]
                if beam in chosen:
                    twin = beam.forked(beam.seed)
                    beams.append(twin)
                    self.requests[twin] = request
                    self._scheduler.add_twins(beam, [twin])
                    beam = twin
                chosen.append(beam)
            for beam, choice in zip(chosen, choices, strict=True):
                self._scheduler.extend(beam, choice.token)
            for beam in gone:
                self.requests.pop(beam, None)
            search.replace(chosen, choices)
            search.is_changing = False
            self._deliver(request)  # a token after which nothing can be computed has ended its beam

    def _deliver(self, request: Request) -> None:
        """Make new tokens known, and the end if it has come; what was delivered before is not repeated."""
        sequence, news = request.sequence, request.news
        if request.search is not None:
            broken = [beam for beam in request.sequences if beam.finish_reason == "error"]
            if broken and not request.ended:
                request.sequence = broken[0]
                self._drop([request], KvpassError(why_failed(request, self._plan)))
            return
        new = sequence.output_from(request.delivered)
        if news.arrived is not None:
            news.arrived.extend((request.index, token) for token in new)
        if new:
            now = time.perf_counter()
            self.latencies.tokens_came(len(new), request.delivered, request.latest, now)
            request.latest = now
        request.delivered += len(new)
        if sequence.state is SequenceState.FINISHED:
            self._forget(request)
            request.end(KvpassError(why_failed(request, self._plan)) if sequence.finish_reason == "error" else None)
        else:
            news.wake()
