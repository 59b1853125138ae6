"""Decoders side by side: one way to time kvpass, the model without a cache, and a contiguous cache, in the same run.

The demo and the scripts in benchmarks/ use it. Every decoder here is greedy, keeps a batch of N prompts of any lengths
under way, and gives one token for each of them per step.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvpass.engine.engine import Engine
from kvpass.errors import InputError
from kvpass.types import Sampling

TO_THE_END = Sampling(ignore_eos=True)
# With one thread on an idle machine these agree. On a busy one the first also counts what others do; with several
# threads the second adds them up, waiting included.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


class Decoder(Protocol):
    """What is timed."""

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Read N prompts from nothing, and return the first new token of each."""

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Given the tokens returned last, return the next one of each prompt."""


class UncachedDecoder:
    """The model as it is: each step computes every token again, all prompts in one batch padded on the right."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ids = torch.zeros(0, 0, dtype=torch.int64)
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As :meth:`Decoder.start`."""
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self.lengths.max())
        self.ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        return self._next()

    def step(self, tokens: Sequence[int]) -> list[int]:
        """As :meth:`Decoder.step`."""
        if int(self.lengths.max()) == self.ids.shape[1]:
            self.ids = torch.cat((self.ids, torch.zeros_like(self.ids[:, :1])), dim=1)
        self.ids[torch.arange(len(tokens)), self.lengths] = torch.tensor(tokens)
        self.lengths = self.lengths + 1
        return self._next()

    def _next(self) -> list[int]:
        # Causal: what stands to the right of a prompt's end changes nothing before it.
        with torch.inference_mode():
            logits: Tensor = self.model(self.ids)
        tokens: list[int] = logits[torch.arange(len(self.ids)), self.lengths - 1].argmax(-1).tolist()
        return tokens


class EngineDecoder:
    """A compiled model, through the engine: scheduling, block tables and sampling are part of the time.

    The prompts have to fit into one step of the engine (``max_batch_tokens``), so that none gets ahead of the others.
    """

    def __init__(self, engine: Engine, max_new_tokens: int) -> None:
        self.engine = engine
        self.max_new_tokens = max_new_tokens
        self.count = 0
        self.tokens: Generator[tuple[int, int], None, None] | None = None

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As :meth:`Decoder.start`; blocks of earlier calls are forgotten, those shared within the batch are used."""
        if self.tokens is not None:
            self.tokens.close()
        self.engine.clear_prefix_cache()
        self.count = len(prompts)
        self.tokens = self.engine.stream([list(prompt) for prompt in prompts], self.max_new_tokens, TO_THE_END)
        return self.step(())

    def step(self, tokens: Sequence[int]) -> list[int]:
        """As :meth:`Decoder.step`; the engine knows the tokens that it returned last."""
        assert self.tokens is not None, "start comes before step"
        following = dict(itertools.islice(self.tokens, self.count))
        if len(following) < self.count:
            raise InputError("the prompts do not fit into one step: raise max_batch_tokens in CacheConfig")
        return [following[index] for index in range(self.count)]


@dataclass
class Timing:
    """What was measured of one decoder.

    Attributes:
        batch: prompts that were under way, N.
        threads: threads of torch that its steps ran on.
        start_seconds: time to the first token of all prompts.
        step_seconds: time of each step.
        tokens: new tokens of each prompt.
    """

    batch: int
    threads: int
    start_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """Median over all steps."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts together, per second of decoding, from the median step."""
        return self.batch / self.seconds_per_step


@dataclass(frozen=True)
class Contender:
    """A decoder that takes part in a measurement.

    Attributes:
        name: for tables.
        decoder: what is timed.
        steps: steps of one turn; slow decoders need fewer.
    """

    name: str
    decoder: Decoder
    steps: int


def time_side_by_side(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    turns: int,
    seconds: float = math.inf,
    after_each: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all contenders on the same prompts: each begins, and then they take turns of a few steps each.

    What else the machine does meanwhile falls on all of them alike. Each takes two turns before, to warm up: one on a
    single thread and one on all that torch may use. It then runs on the number that was quicker, since what suits a
    step of one token hampers a step of a thousand, and the other way round.

    Args:
        contenders: those that take part.
        prompts: token ids, any lengths.
        turns: how many turns each of them gets, at least 2.
        seconds: after this time no further turns begin, but each contender gets one.
        after_each: called after each turn that counts, and after each beginning.
        clock: one of :data:`CLOCKS`.
    """
    all_threads = torch.get_num_threads()
    began = time.perf_counter()
    timings: dict[str, Timing] = {}
    try:
        for contender in contenders:
            trials = [Timing(len(prompts), threads) for threads in sorted({1, all_threads})]
            tokens = [[token] for token in contender.decoder.start(prompts)]
            for trial in trials:
                trial.tokens = tokens
                _take_turn(contender, trial, clock)
            best = min(trials, key=lambda trial: trial.seconds_per_step)
            torch.set_num_threads(all_threads)
            timing = timings[contender.name] = Timing(len(prompts), best.threads)
            before = clock()
            timing.tokens = [[token] for token in contender.decoder.start(prompts)]
            timing.start_seconds = clock() - before
            after_each()
        for turn in range(turns):
            if turn > 0 and time.perf_counter() - began > seconds:
                break
            for contender in contenders:
                _take_turn(contender, timings[contender.name], clock)
                after_each()
    finally:
        torch.set_num_threads(all_threads)
    return timings


def _take_turn(contender: Contender, timing: Timing, clock: Callable[[], float]) -> None:
    torch.set_num_threads(timing.threads)
    for _ in range(contender.steps):
        newest = [history[-1] for history in timing.tokens]
        before = clock()
        following = contender.decoder.step(newest)
        timing.step_seconds.append(clock() - before)
        for history, token in zip(timing.tokens, following, strict=True):
            history.append(token)


def count_agreeing(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens agree, up to the first difference of each prompt, and how many were compared."""
    agreeing, compared = 0, 0
    for ours, theirs in zip(tokens, others, strict=True):
        length = min(len(ours), len(theirs))
        compared += length
        agreeing += next((i for i in range(length) if ours[i] != theirs[i]), length)
    return agreeing, compared


def describe_machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, threads and versions; no names of machines or people."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvpass": version("kvpass"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write_result(
    folder: Path, benchmark: str, options: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Path:
    """Write ``folder/<benchmark>.json``: date, machine, options and results; returns its path."""
    content = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "options": dict(options),
        "results": [dict(result) for result in results],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
