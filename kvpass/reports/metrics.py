"""Figures of engines for Prometheus, through its official client library: ``pip install kvpass[metrics]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from kvpass.engine.engine import Engine
from kvpass.errors import InputError
from kvpass.runtime.schedule.stats import EngineStats

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
BETWEEN_TOKENS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metric(NamedTuple):
    """One number of the stats. Counters only rise; their names get ``_total`` at the end."""

    name: str
    help: str
    value: Callable[[EngineStats], float]
    counter: bool = True


METRICS = (
    Metric("sequences_running", "Sequences that hold blocks.", lambda s: s.running, False),
    Metric("sequences_waiting", "Sequences that are queued.", lambda s: s.waiting, False),
    Metric("cache_reserved_bytes", "Bytes of all caches, used or not.", lambda s: s.bytes_reserved, False),
    Metric("cache_peak_used_bytes", "Bytes of the most blocks used at once.", lambda s: s.bytes_peak_used, False),
    Metric("cache_waste_ratio", "Slots of used blocks that held no token, over all steps.", lambda s: s.waste, False),
    Metric("steps", "Steps computed.", lambda s: s.steps),
    Metric("prefill_tokens", "Tokens computed of prompts, or computed again.", lambda s: s.prefill_tokens),
    Metric("decode_tokens", "New tokens computed one by one.", lambda s: s.decode_tokens),
    Metric("prefix_hit_tokens", "Tokens found in the prefix cache.", lambda s: s.prefix_hit_tokens),
    Metric("prefix_lookup_tokens", "Tokens looked up in the prefix cache.", lambda s: s.prefix_lookup_tokens),
    Metric("evicted_blocks", "Blocks whose content was given up to make room.", lambda s: s.evictions),
    Metric("demoted_blocks", "Evicted blocks that went to host memory.", lambda s: s.tiers.demoted),
    Metric("promoted_blocks", "Blocks that came back from host memory.", lambda s: s.tiers.promoted),
    Metric("disk_written_blocks", "Blocks written to disk.", lambda s: s.tiers.written),
    Metric("disk_read_blocks", "Blocks read back from disk.", lambda s: s.tiers.read),
    Metric("disk_errors", "Times that something on disk was broken or refused.", lambda s: s.tiers.disk_errors),
    Metric("host_bytes", "Bytes of evicted blocks in host memory.", lambda s: s.tiers.host_bytes, False),
    Metric("disk_bytes", "Bytes of evicted blocks on disk.", lambda s: s.tiers.disk_bytes, False),
    Metric("preemptions", "Sequences that gave their blocks back before their end.", lambda s: s.preemptions),
    Metric("drafted_tokens", "Proposed tokens that were computed.", lambda s: s.drafted_tokens),
    Metric("drafted_trees", "Proposals with several continuations that were computed.", lambda s: s.drafted_trees),
    Metric("accepted_tokens", "Proposed tokens that were generated.", lambda s: s.accepted_tokens),
)


class EngineCollector:
    """A collector, in the sense of the client library, of one engine or more; their figures are read when scraped.

    It does not keep engines alive: the figures of one that is gone are gone.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise InputError("prometheus_client is not installed: pip install 'kvpass[metrics]'") from error
        self._core = core
        self._engines: list[tuple[ref[Engine], dict[str, str]]] = []
        self._known: WeakSet[Engine] = WeakSet()

    def add(self, engine: Engine, **labels: str) -> None:
        """Collect one more engine.

        Args:
            engine: whose figures are wanted.
            labels: stand on all its figures, and tell it from others; each engine has the same ones.

        Raises:
            InputError: if the engine is collected already, or its labels do not tell it from another.
        """
        alive = [other for reference, other in self._engines if reference() is not None]
        if engine in self._known or labels in alive:
            raise InputError(f"an engine with the labels {labels} is collected already: give each labels of its own")
        if alive and alive[0].keys() != labels.keys():
            raise InputError(
                f"labels are {sorted(labels)}, and the other engines have {sorted(alive[0])}: use the same"
            )
        self._known.add(engine)
        self._engines.append((ref(engine), labels))

    def describe(self) -> list[Any]:
        """Nothing: what there is shows when it is collected."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metric families, as the client library asks for them."""
        found = [(engine, labels) for reference, labels in self._engines if (engine := reference()) is not None]
        if not found:
            return
        names = list(found[0][1])
        rows = [([labels[name] for name in names], engine.stats(), engine.latencies()) for engine, labels in found]
        for metric in METRICS:
            family = self._core.CounterMetricFamily if metric.counter else self._core.GaugeMetricFamily
            made = family(f"kvpass_{metric.name}", metric.help, labels=names)
            for labels, stats, _ in rows:
                made.add_metric(labels, metric.value(stats))
            yield made
        blocks = self._core.GaugeMetricFamily(
            "kvpass_blocks", "Blocks of the pool, by state.", labels=[*names, "state"]
        )
        for labels, stats, _ in rows:
            for state in ("free", "used", "cached"):
                blocks.add_metric([*labels, state], getattr(stats, f"blocks_{state}"))
        yield blocks
        for name, text, bounds in (
            ("first_token", "Seconds from the submission of a request to its first token.", FIRST_TOKEN_BOUNDS),
            ("between_tokens", "Seconds from one token of a request to the next.", BETWEEN_TOKENS_BOUNDS),
        ):
            histogram = self._core.HistogramMetricFamily(f"kvpass_{name}_seconds", text, labels=names)
            for labels, _, latencies in rows:
                times = getattr(latencies, name)
                counts = [*times.cumulative(bounds), times.count]
                buckets = list(zip([*map(str, bounds), "+Inf"], counts, strict=True))
                histogram.add_metric(labels, buckets, times.total)
            yield histogram


def register(engine: Engine, registry: Any = None, **labels: str) -> EngineCollector:
    """Have ``registry`` show the figures of an engine.

    Args:
        engine: whose figures are wanted.
        registry: a ``prometheus_client.CollectorRegistry``; the library's default when None.
        labels: stand on all figures, such as ``model="small"``.

    Returns:
        the collector: :meth:`EngineCollector.add` puts further engines into the same figures.

    Raises:
        InputError: if the client library is not installed.
    """
    collector = EngineCollector()
    collector.add(engine, **labels)
    (collector._core.REGISTRY if registry is None else registry).register(collector)
    return collector
