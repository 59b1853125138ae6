"""Replays a request trace against the real engine, with a simulated model or a real one, and keeps its figures.

Time is virtual: it advances by what a step costs, and jumps to the next arrival when nothing is under way. A simulated
model costs what it is told to; a real one what the step takes by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.engine.handle import Handle
from kvpass.errors import CapacityError
from kvpass.report import RewriteReport
from kvpass.runtime.sampling.random_numbers import uniform_numbers
from kvpass.runtime.schedule.latency import Histogram, Percentiles
from kvpass.runtime.schedule.stats import EngineStats
from kvpass.trace.requests import TraceRequest
from kvpass.types import CachePlan, CacheSpec, Sampling, StepInputs

VOCABULARY = 256  # of a simulated model: enough that blocks of other prompts do not look alike
SAMPLES = 500  # moments of which the figures are kept, about


class SimulatedModel:
    """A model that computes nothing, in a time that is told; its output is unlike any prompt, and always the same.

    Attributes:
        device: where its steps are.
        seconds: virtual time spent so far.
    """

    device = torch.device("cpu")

    def __init__(self, step_seconds: float, token_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._token_seconds = token_seconds
        self._drawn = 0
        self.seconds = 0.0

    def __call__(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]], /) -> Tensor:
        """Logits ``[R, V]`` with one token each that stands out."""
        self.seconds += self._step_seconds + self._token_seconds * len(step.token_ids)
        rows = len(step.logits_index)
        drawn = uniform_numbers([0] * rows, range(self._drawn, self._drawn + rows)) * VOCABULARY
        self._drawn += rows
        logits = torch.zeros(rows, VOCABULARY)
        logits[torch.arange(rows), torch.from_numpy(drawn.astype(np.int64))] = 1.0
        return logits


def simulated_engine(config: CacheConfig, step_seconds: float, token_seconds: float) -> Engine:
    """An engine without a model: a step costs ``step_seconds``, and ``token_seconds`` for each token computed in it."""
    plan = CachePlan((CacheSpec("nothing", 1, 1, 1, "float32", "float32"),), config.block_size, VOCABULARY)
    return Engine(SimulatedModel(step_seconds, token_seconds), plan, config, RewriteReport())


@dataclass(frozen=True)
class Moment:
    """Figures at one moment.

    Attributes:
        seconds: virtual time.
        used: blocks of running sequences.
        cached: blocks kept for reuse.
        free: blocks that hold nothing.
        running: sequences that hold blocks.
        waiting: sequences that are queued.
        hit_rate: hits over tokens looked up lately, that is since figures were last taken and something was looked up.
        hit_rate_so_far: the same since the beginning.
    """

    seconds: float
    used: int
    cached: int
    free: int
    running: int
    waiting: int
    hit_rate: float
    hit_rate_so_far: float


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        requests: requests of the trace.
        finished: those that came to their end.
        too_large: those that the pool, or the model, cannot hold even alone.
        seconds: virtual time from the first arrival to the last token.
        input_tokens: of the prompts of the requests that finished.
        output_tokens: generated.
        hit_rate: tokens found in the prefix cache over tokens looked up.
        first_token: virtual seconds from arrival to first token.
        between_tokens: virtual seconds from one token to the next.
        evictions: blocks whose content was given up to make room.
        preemptions: sequences that gave their blocks back before their end.
        waste: slots of used blocks that held nothing, over all steps.
        steps: steps computed.
        blocks: blocks of the pool.
        moments: figures over time.
    """

    requests: int
    finished: int
    too_large: int
    seconds: float
    input_tokens: int
    output_tokens: int
    hit_rate: float
    first_token: Percentiles
    between_tokens: Percentiles
    evictions: int
    preemptions: int
    waste: float
    steps: int
    blocks: int
    moments: tuple[Moment, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers."""
        return asdict(self)


@dataclass(eq=False)
class _Running:
    """A request under way: when it came, how many tokens it has had, and when the last of them."""

    handle: Handle
    latest: float
    delivered: int = 0


class _Replayer:
    """The state of a replay."""

    def __init__(self, engine: Engine, interval: float) -> None:
        self._engine = engine
        self._interval = interval
        self._running: list[_Running] = []
        self._started = engine.stats()
        self._before = self._started
        self.now = 0.0
        self.finished = self.too_large = self.input_tokens = self.output_tokens = 0
        self.first_token, self.between_tokens = Histogram(), Histogram()
        self.moments: list[Moment] = []

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, request: TraceRequest, arrival: float) -> None:
        plan = self._engine.plan
        length = request.input_length + request.output_length
        if plan.max_length is not None and length > plan.max_length:
            self.too_large += 1
            return
        prompt = request.tokens(plan.vocab_size)
        try:
            handle = self._engine.submit(prompt, request.output_length, Sampling(ignore_eos=True))  # type: ignore[arg-type]
        except CapacityError:
            self.too_large += 1
        else:
            self._running.append(_Running(handle, arrival))

    def step(self) -> None:
        """Compute one step, and take note of what came."""
        model = self._engine.module
        if isinstance(model, SimulatedModel):
            before = model.seconds
            self._engine.step()
            self.now += model.seconds - before
        else:
            start = time.perf_counter()
            self._engine.step()
            self.now += time.perf_counter() - start
        for request in self._running:
            self._take_note(request)
        self._running = [request for request in self._running if not request.handle.done]
        if not self.moments or self.now >= self.moments[-1].seconds + self._interval:
            self.keep_moment()

    def _take_note(self, request: _Running) -> None:
        new = request.handle.num_tokens - request.delivered
        if new > 0:
            if request.delivered:
                self.between_tokens.add((self.now - request.latest) / new, new)
            else:
                self.first_token.add(self.now - request.latest)
            request.delivered += new
            request.latest = self.now
        if request.handle.done:
            tokens = request.handle.result()  # raises what ended it
            self.finished += 1
            self.output_tokens += len(tokens)
            self.input_tokens += request.handle.prompt_length

    def keep_moment(self) -> None:
        stats = self._engine.stats()
        looked_up = stats.prefix_lookup_tokens - self._before.prefix_lookup_tokens
        recent = self.moments[-1].hit_rate if self.moments else 0.0
        if looked_up:
            recent = (stats.prefix_hit_tokens - self._before.prefix_hit_tokens) / looked_up
        self._before = stats
        counts = (stats.blocks_used, stats.blocks_cached, stats.blocks_free, stats.running, stats.waiting)
        self.moments.append(Moment(self.now, *counts, recent, _hit_rate(stats, self._started)))
        if len(self.moments) > 2 * SAMPLES:
            # It takes longer than the trace: half as many moments will do.
            self.moments = self.moments[::2]
            self._interval = 2 * max(self._interval, self.now / (2 * SAMPLES))

    def result(self, requests: int) -> Replay:
        stats = self._engine.stats()
        return Replay(
            requests=requests,
            finished=self.finished,
            too_large=self.too_large,
            seconds=self.now,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            hit_rate=_hit_rate(stats, self._started),
            first_token=self.first_token.percentiles(),
            between_tokens=self.between_tokens.percentiles(),
            evictions=stats.evictions - self._started.evictions,
            preemptions=stats.preemptions - self._started.preemptions,
            waste=stats.waste,
            steps=stats.steps - self._started.steps,
            blocks=stats.blocks_total,
            moments=tuple(self.moments),
        )


def replay_trace(engine: Engine, trace: Sequence[TraceRequest], speed: float = 1.0) -> Replay:
    """Replay ``trace``, in the order of arrival, against an engine that does nothing else meanwhile.

    Args:
        engine: a simulated one, see :func:`simulated_engine`, or one with a model. Output lengths are those of the
            trace, whatever the model would end at.
        trace: the requests.
        speed: arrivals come this many times faster.

    Raises:
        InputError: if a prompt has token ids beyond those of the model.
        KvpassError: if a request fails.
    """
    replayer = _Replayer(engine, interval=trace[-1].arrival / speed / SAMPLES)
    coming = 0
    while coming < len(trace) or replayer.busy:
        if not replayer.busy:
            replayer.now = max(replayer.now, trace[coming].arrival / speed)
        while coming < len(trace) and trace[coming].arrival / speed <= replayer.now:
            replayer.submit(trace[coming], trace[coming].arrival / speed)
            coming += 1
        if replayer.busy:
            replayer.step()
    replayer.keep_moment()
    return replayer.result(len(trace))


def _hit_rate(now: EngineStats, before: EngineStats) -> float:
    looked_up = now.prefix_lookup_tokens - before.prefix_lookup_tokens
    return (now.prefix_hit_tokens - before.prefix_hit_tokens) / max(1, looked_up)
