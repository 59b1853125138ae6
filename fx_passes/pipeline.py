"""How passes are run: in order, each checked to leave what its dialect promises, and every failure a refusal.

A *stage* is an ordered tuple of passes and dialects. A :class:`Dialect` says what holds of the graph from its place in
the tuple on, until the next one takes its place; it is checked there, and again after each pass that follows. So what a
pass requires of the ones before it stands in code, and a pass that breaks it is found at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, refuse
from kvpass.types import Refusal

DEFECT = "the pass failed, which is a defect of kvpass worth a report"


class State(Protocol):
    """What the passes of a stage work on; a :class:`CapturedGraph`, or something that holds one."""

    @property
    def captured(self) -> CapturedGraph:
        """The graph."""


S = TypeVar("S", bound=State)
S_contra = TypeVar("S_contra", bound=State, contravariant=True)


class Pass(Protocol[S_contra]):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """Kebab-case name."""

    def apply(self, state: S_contra, /) -> PassResult:
        """Rewrite or check; a second run changes nothing."""


Rule = Callable[[CapturedGraph], Iterable[tuple[Node | None, str]]]  # nodes that break it, and how


@dataclass(frozen=True)
class Dialect:
    """What holds of a graph from one place of a stage on.

    Attributes:
        name: kebab-case.
        rules: each gives the nodes that break it, with what is wrong in words.
    """

    name: str
    rules: tuple[Rule, ...]

    def broken(self, captured: CapturedGraph, by: str) -> list[Refusal]:
        """A refusal for each node that a rule complains of; ``by`` is the pass that ran last."""
        return [
            Refusal(f"{DEFECT}: after {by} the graph is not {self.name}: {complaint}", pass_name=by)
            if node is None
            else refuse(captured, node, f"{DEFECT}: after {by} the graph is not {self.name}: it {complaint}", by)
            for rule in self.rules
            for node, complaint in rule(captured)
        ]


@dataclass
class PassLog:
    """What a run of passes gave: refusals, seconds by pass, and what broke, if a pass did."""

    refusals: list[Refusal] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    def spent(self, name: str, seconds: float) -> None:
        """Add to the time of a pass."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Refused(Exception):
    """A stage refused; the log says why."""

    def __init__(self, log: PassLog) -> None:
        super().__init__("; ".join(map(str, log.refusals)))
        self.log = log


PASSING: tuple[type[Exception], ...] = (MemoryError, torch.OutOfMemoryError, Refused)  # no fault of a pass


def run_passes(
    state: S,
    stage: Sequence[Pass[S] | Dialect],
    log: PassLog | None = None,
    passing: tuple[type[Exception], ...] = (),
) -> PassLog:
    """Apply the passes of a stage one after the other, and add to a log; errors of the types ``passing`` are raised.

    All are run, so that a report names everything that stands in the way; but nothing is run on a graph that broke its
    dialect, or on which a pass failed.
    """
    log = log or PassLog()
    dialect: Dialect | None = None
    last = "the stage before"
    for step in stage:
        start = time.perf_counter()
        if isinstance(step, Dialect):
            dialect = step
        else:
            try:
                result = step.apply(state)
            except (*PASSING, *passing):
                raise
            except Exception as error:  # fail closed: what a pass cannot handle is not rewritten
                log.refusals.append(Refusal(f"{DEFECT}: {type(error).__name__}: {error}", pass_name=step.name))
                log.error = error
                return log
            log.refusals += result.refusals
            if result.rewritten:
                state.captured.analyses.clear()
            last = step.name
        broken = [] if dialect is None or log.refusals else _broken(state.captured, dialect, last, log)
        log.spent("dialects" if isinstance(step, Dialect) else step.name, time.perf_counter() - start)
        if broken:
            log.refusals += broken
            return log
    return log


def _broken(captured: CapturedGraph, dialect: Dialect, last: str, log: PassLog) -> list[Refusal]:
    try:
        return dialect.broken(captured, last)
    except Exception as error:
        log.error = error
        return [Refusal(f"{DEFECT}: {type(error).__name__}: {error}", pass_name=last)]


@contextmanager
def failing_closed(log: PassLog, name: str, *passing: type[Exception]) -> Iterator[None]:
    """Make whatever a step raises a refusal of the log, but for errors that are the caller's to see.

    Raises:
        Refused: if the step failed.
    """
    start = time.perf_counter()
    try:
        yield
    except (*PASSING, *passing):
        raise
    except Exception as error:
        log.refusals.append(Refusal(f"{DEFECT}: {type(error).__name__}: {error}", pass_name=name))
        log.error = error
        raise Refused(log) from error
    finally:
        log.spent(name, time.perf_counter() - start)
