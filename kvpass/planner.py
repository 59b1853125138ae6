"""How much memory a cache needs, how many sequences fit, and what each technique saves: ``kvpass plan``.

Every number follows from the plan of caches and the functions that the runtime allocates by.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table
from torch import nn

from kvpass.compiler import Recompiler
from kvpass.config import CacheConfig
from kvpass.errors import ConfigError, InputError
from kvpass.fx_passes.planning.group_caches import group_caches
from kvpass.kernels.formats.cache_formats import cache_bytes_per_token
from kvpass.runtime.pool.capacity import Room, bytes_per_block, divide_memory
from kvpass.runtime.pool.footprint import blocks_of_prefix, blocks_of_sequence, sequences_that_fit
from kvpass.runtime.pool.state_slots import bytes_per_state
from kvpass.types import CachePlan, CacheSpec

EXACT_FORMATS = {4: "float32", 2: "bfloat16", 1: "fp8_e4m3"}  # by bytes of a number, for who has no model at hand


@dataclass(frozen=True)
class Demand:
    """What is asked of a cache.

    Attributes:
        context: cached tokens of each sequence, prompt and output together.
        shared_prefix: tokens at the beginning that all sequences have in common.
        requests: sequences that are wanted at once; None where that is not asked.
    """

    context: int
    shared_prefix: int = 0
    requests: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix <= self.context:
            raise InputError(
                f"a shared prefix of {self.shared_prefix} tokens does not fit a context of {self.context}: the context "
                f"counts the prefix"
            )


@dataclass(frozen=True)
class Shape:
    """Attention by plain numbers: equal layers that store keys and values.

    Attributes:
        layers: attentions.
        kv_heads: heads that are stored.
        head_dim: width of a key head, and of a value head unless ``value_dim`` says otherwise.
        query_heads: query heads; as many as ``kv_heads`` when None.
        value_dim: width of a value head.
        window: tokens that are looked at by the last ``window_layers`` layers.
        window_layers: how many layers have the window; all of them when None.
    """

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int | None = None
    value_dim: int | None = None
    window: int | None = None
    window_layers: int | None = None

    def __post_init__(self) -> None:
        if self.query_heads is not None and self.query_heads % self.kv_heads:
            raise InputError(f"{self.query_heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if self.window_layers is not None and (self.window is None or self.window_layers > self.layers):
            raise InputError(f"{self.window_layers} window layers need a window, and at least as many layers")

    @property
    def bytes_received(self) -> int:
        """Numbers of keys and values of a token when each query head has its own."""
        heads = self.query_heads or self.kv_heads
        return self.layers * heads * (self.head_dim + (self.value_dim or self.head_dim))

    def plan(self, form: str, block_size: int) -> CachePlan:
        """The caches of such a model, in one format."""
        windowed = self.layers if self.window_layers is None else self.window_layers
        specs = tuple(
            CacheSpec(
                f"layer {layer}",
                self.kv_heads,
                self.head_dim,
                self.value_dim or self.head_dim,
                form,
                form,
                self.window if layer >= self.layers - windowed else None,
            )
            for layer in range(self.layers)
        )
        return CachePlan(group_caches(specs), block_size, vocab_size=1)


@dataclass(frozen=True)
class Stage:
    """Memory once a technique is used, and all those above it.

    Attributes:
        name: the technique.
        bytes_per_token: of one token in all caches.
        bytes_of_sequence: of one sequence more, in whole blocks and recurrent states, beside what all share.
        bytes_of_requests: of all requests; None where their number is not given.
        fit: sequences that the memory holds.
    """

    name: str
    bytes_per_token: int
    bytes_of_sequence: int
    bytes_of_requests: int | None
    fit: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a cache of some memory holds.

    Attributes:
        demand: what was asked.
        block_size: tokens per block.
        num_blocks: blocks of the pool.
        bytes_per_block: of one block in all caches.
        bytes_reserved: of the tensors of the pool, and of recurrent states.
        bytes_given: memory that they may take.
        stages: one technique after the other; the last one is what the engine does.
    """

    demand: Demand
    block_size: int
    num_blocks: int
    bytes_per_block: int
    bytes_reserved: int
    bytes_given: int
    stages: tuple[Stage, ...]


def plan_memory(received: int, exact: CachePlan, stored: CachePlan, config: CacheConfig, demand: Demand) -> MemoryPlan:
    """Work out what a pool of ``config`` holds.

    Args:
        received: bytes of keys and values of one token as the attentions receive them.
        exact: the caches in the formats of the model's own dtype.
        stored: the caches as they are stored.
        config: memory, or number of blocks, of the pool.
        demand: what is asked of it.

    Raises:
        InputError: if the model cannot hold the context.
        ConfigError: if the memory holds no block.
    """
    limit = stored.max_length
    if limit is not None and demand.context > limit:
        raise InputError(
            f"a context of {demand.context} tokens is longer than the model is proven for, {limit} "
            f"({stored.max_length_reason}): ask for a shorter one"
        )
    room, size = divide_memory(stored, config), bytes_per_block(stored)
    num_blocks, reserved = room.num_blocks, room.num_blocks * size + room.wide_bytes + room.state_bytes
    given = config.num_blocks is None and config.memory_share is None
    memory = config.memory_bytes if given else reserved
    stages = [_contiguous("every head that attention receives", received, bytes_per_state(stored), memory, demand)]
    unwindowed = [_without_windows(plan) for plan in (exact, stored)]
    stages.append(_paged("the narrowest cut", unwindowed[0], room, memory, demand, 0))
    if stored != exact:
        names = sorted({form for spec in stored.caches for form in (spec.key_format, spec.value_format)})
        stages.append(_paged(f"stored as {', '.join(names)}", unwindowed[1], room, memory, demand, 0))
    if any(spec.window is not None for spec in stored.caches):
        stages.append(_paged("windows give blocks back", stored, room, memory, demand, 0))
    if demand.shared_prefix and not stored.states:  # a block's content does not hold the state behind it
        name = f"{demand.shared_prefix} tokens shared"
        stages.append(_paged(name, stored, room, memory, demand, demand.shared_prefix))
    return MemoryPlan(demand, stored.block_size, num_blocks, size, reserved, memory, tuple(stages))


def plan_shape(shape: Shape, number_bytes: int, config: CacheConfig, demand: Demand) -> MemoryPlan:
    """As :func:`plan_memory`, by plain numbers; ``number_bytes`` is 4, 2 or 1.

    Raises:
        ConfigError: if there is no such format, or the memory holds no block.
    """
    if number_bytes not in EXACT_FORMATS:
        raise ConfigError(f"numbers of {number_bytes} bytes have no cache format: 4, 2 or 1, or name a format by dtype")
    own = EXACT_FORMATS[number_bytes]
    form = own if config.dtype == "auto" else config.dtype
    if not isinstance(form, str):
        raise ConfigError("by plain numbers all layers are alike: give one format as dtype")
    exact, stored = (shape.plan(name, config.block_size) for name in (own, form))
    return plan_memory(shape.bytes_received * number_bytes, exact, stored, config, demand)


def plan_model(model: nn.Module, config: CacheConfig, demand: Demand) -> MemoryPlan:
    """As :func:`plan_memory`, for the caches that the passes find in a model.

    Raises:
        RefusedError: if it cannot be rewritten.
        InputError: if it cannot hold the context.
        ConfigError: if the memory holds no block.
    """
    recompiler = Recompiler(model)
    small = replace(config, memory=None, num_blocks=1)
    engine = recompiler.compile(replace(small, dtype="auto"), verify=False)
    exact = engine.plan
    stored = exact if config.dtype == "auto" else recompiler.compile(small, verify=False).plan
    return plan_memory(engine.report.bytes_per_token_before, exact, stored, config, demand)


def plan_table(plan: MemoryPlan) -> Table:
    """The stages of a plan for a terminal."""
    table = Table(title=f"sequences of {plan.demand.context} tokens in {bytes_text(plan.bytes_given)}")
    table.add_column("one technique after the other")
    columns = ["a token", "a sequence", "less by", "sequences"]
    if plan.demand.requests is not None:
        columns.insert(2, f"{plan.demand.requests} requests")
    for column in columns:
        table.add_column(column, justify="right")
    before: Stage | None = None
    for stage in plan.stages:
        cells = [bytes_text(stage.bytes_per_token), bytes_text(stage.bytes_of_sequence)]
        if stage.bytes_of_requests is not None:
            cells.append(bytes_text(stage.bytes_of_requests))
        table.add_row(
            stage.name, *cells, "" if before is None else f"{_size(before) / _size(stage):.2f}x", f"{stage.fit}"
        )
        before = stage
    return table


def plan_lines(plan: MemoryPlan) -> list[str]:
    """The pool that the last stage stands for, in words."""
    last, demand = plan.stages[-1], plan.demand
    lines = [
        f"the pool: {plan.num_blocks} blocks of {plan.block_size} tokens, {bytes_text(plan.bytes_per_block)} each; "
        f"{last.bytes_per_token} bytes per token"
    ]
    if demand.requests is not None:
        enough = last.fit >= demand.requests
        lines.append(
            f"{demand.requests} requests of {demand.context} tokens "
            + ("fit at once" if enough else f"do not fit at once: {last.fit} run, the others wait for their turn")
        )
    return lines


def plan_data(plan: MemoryPlan) -> dict[str, Any]:
    """The same as plain dicts, lists, strings and numbers."""
    return asdict(plan)


def bytes_text(count: int) -> str:
    """``131072`` -> ``"128 KiB"``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def _contiguous(name: str, per_token: int, state: int, memory: int, demand: Demand) -> Stage:
    """A cache without blocks."""
    sequence = per_token * demand.context + state
    total = None if demand.requests is None else sequence * demand.requests
    return Stage(name, per_token, sequence, total, memory // max(1, sequence))


def _paged(name: str, plan: CachePlan, room: Room, memory: int, demand: Demand, prefix: int) -> Stage:
    """A cache in blocks, of which all sequences share those of a ``prefix``, beside the states of all that may run."""
    size, state = bytes_per_block(plan), bytes_per_state(plan)
    shared = blocks_of_prefix(plan, demand.context, prefix)
    blocks = blocks_of_sequence(plan, demand.context)
    requests = demand.requests
    total = None if requests is None else (shared + (blocks - shared) * requests) * size + requests * state
    fit = sequences_that_fit(plan, (memory - room.state_bytes) // max(1, size), demand.context, prefix)
    fit = min(fit, room.state_slots) if plan.states else fit
    per_token = sum(map(cache_bytes_per_token, plan.caches))
    return Stage(name, per_token, (blocks - shared) * size + state, total, fit)


def _without_windows(plan: CachePlan) -> CachePlan:
    return replace(plan, caches=tuple(replace(spec, window=None, group=0) for spec in plan.caches))


def _size(stage: Stage) -> int:
    return max(1, stage.bytes_of_sequence if stage.bytes_of_requests is None else stage.bytes_of_requests)
