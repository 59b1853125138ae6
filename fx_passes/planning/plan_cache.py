"""``plan-cache``: for each attention what is stored, in which heads and format, and for how long sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import Node

from kvpass.config import CacheConfig
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.graph import (
    DEFAULT_TABLE_LENGTH,
    CapturedGraph,
    PassResult,
    arguments,
    aten,
    is_call,
    module_path,
    shape_of,
)
from kvpass.fx_passes.masks.read_masks import MASK
from kvpass.fx_passes.planning.absorb import Absorption
from kvpass.fx_passes.planning.choose_formats import choose_formats, exact_formats, final_formats
from kvpass.fx_passes.planning.choose_storage import StoredHeads, store_heads
from kvpass.fx_passes.planning.group_caches import group_caches
from kvpass.fx_passes.planning.value_numbering import EntryClasses
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator, shape_evaluator
from kvpass.fx_passes.token_axis.find_positions import LONGEST_PROBE, SOURCE, Counting, Lookup, Tabulated, longest_valid
from kvpass.fx_passes.token_axis.infer_axes import Inference
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from kvpass.kernels.formats.cache_formats import format_for_dtype
from kvpass.types import CachePlan, CacheSpec, MaskMeaning

LOOKUPS = (aten.embedding, aten.index_select, aten.index, aten.gather)


@dataclass(frozen=True, eq=False)
class SitePlan:
    """One attention and the cache it reads.

    Attributes:
        node: the canonical attention.
        name: unique name of the site, from its module path.
        cache: index of its cache in the plan.
        mask: what its mask means.
        head_order: query heads ordered so that those of one KV head stand together; None when they do already.
        absorption: how its keys and values follow from the stored heads; None where they are those.
    """

    node: Node
    name: str
    cache: int
    mask: MaskMeaning
    head_order: tuple[int, ...] | None
    absorption: Absorption | None = None


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """What the rewrite will do: the part that the runtime sees, and the nodes that it is about.

    Attributes:
        cache_plan: the caches, in exact or at least wide float formats.
        sites: the attentions.
        stored: what each cache holds.
        inference: axes of the graph's nodes.
        evaluator: of the graph's shape-only nodes.
        formats: of keys and values, in which each cache is to be stored in the end.
    """

    cache_plan: CachePlan
    sites: tuple[SitePlan, ...]
    stored: tuple[StoredHeads, ...]
    inference: Inference
    evaluator: ShapeEvaluator
    formats: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class Planning:
    """A plan in the making: what the passes of the stage fill in, one after the other.

    Attributes:
        captured: a graph after ``find-attention``, ``read-masks`` and ``prove-token-axis``, none of which refused.
        config: formats and block size.
        vocab_size: number of token ids.
        sites: the attentions.
        stored: what each cache holds.
        readers: names of the attentions that read each cache.
        windows: how far each of them looks back.
        specs: the caches, in exact or at least wide float formats.
        formats: of keys and values, in which each cache is to be stored in the end.
        limit: the longest sequence for which everything was proven.
        limit_reason: what limits it.
    """

    captured: CapturedGraph
    config: CacheConfig
    vocab_size: int
    sites: list[SitePlan] = field(default_factory=list)
    stored: list[StoredHeads] = field(default_factory=list)
    readers: list[list[str]] = field(default_factory=list)
    windows: list[list[int | None]] = field(default_factory=list)
    specs: tuple[CacheSpec, ...] = ()
    formats: tuple[tuple[str, str], ...] = ()
    limit: int | None = None
    limit_reason: str = ""

    @property
    def inference(self) -> Inference:
        """Axes of the graph's nodes."""
        return self.captured.analysis(token_axes)

    @property
    def evaluator(self) -> ShapeEvaluator:
        """Of the graph's shape-only nodes."""
        return self.captured.analysis(shape_evaluator)

    def finished(self) -> GraphPlan:
        """The plan."""
        forbidden = tuple(sorted(self.captured.forbidden_tokens))
        prefix = next((site.mask.prefix or 0 for site in self.sites), 0)
        block, most, reason = self.config.block_size, self.limit, self.limit_reason
        plan = CachePlan(self.specs, block, self.vocab_size, most, reason, forbidden, prefix)
        return GraphPlan(plan, tuple(self.sites), tuple(self.stored), self.inference, self.evaluator, self.formats)


@dataclass(frozen=True)
class ChooseStorage:
    """Choose for each attention what is stored: keys and values, or something narrower; equal ones are stored once.

    Before: proven attentions.
    After: each has a cache, which it may share.
    Requires: ``prove-token-axis``.
    Refuses: nothing.
    """

    name: str = "choose-storage"

    def apply(self, planning: Planning) -> PassResult:
        """Read each attention, in graph order; the graph stays as it is."""
        classes = EntryClasses(planning.inference, planning.evaluator)
        for node in attention_sites(planning.captured):
            mask = node.meta[MASK]
            reading = store_heads(classes, node, mask, planning.config)
            known = (i for i, stored in enumerate(planning.stored) if stored.same(reading.stored))
            index = next(known, len(planning.stored))
            if index == len(planning.stored):  # layers that share keys and values share one cache
                planning.stored.append(reading.stored)
                planning.readers.append([])
                planning.windows.append([])
            elif planning.stored[index].structure != reading.stored.structure:
                classes.note_equal(planning.stored[index].nodes, reading.stored.nodes)
            path = module_path(node, planning.captured) or "attention"
            name = _unique(path, {site.name for site in planning.sites})
            planning.readers[index].append(name)
            planning.windows[index].append(mask.reach)
            planning.sites.append(SitePlan(node, name, index, mask, reading.head_order, reading.absorption))
        return PassResult()


@dataclass(frozen=True)
class ChooseFormats:
    """Choose the formats of each cache: exact ones to prove the structure in, and those that are asked for.

    Before: caches without formats.
    After: caches with both.
    Requires: ``choose-storage``.
    Refuses: nothing; a format that cannot hold a cache's heads raises :class:`~kvpass.errors.ConfigError`.
    """

    name: str = "choose-formats"

    def apply(self, planning: Planning) -> PassResult:
        """One pair of formats for each cache."""
        chosen = choose_formats(planning.config, [site.cache for site in planning.sites], len(planning.stored))
        exact = map(exact_formats, chosen)
        columns = zip(planning.stored, planning.readers, planning.windows, exact, strict=True)
        planning.specs = tuple(_spec(*column) for column in columns)
        planning.formats = tuple(final_formats(spec, pair) for spec, pair in zip(planning.specs, chosen, strict=True))
        return PassResult()


@dataclass(frozen=True)
class GroupCaches:
    """Divide the caches into groups that share block tables, see :mod:`~kvpass.fx_passes.planning.group_caches`.

    Before: caches of one group.
    After: groups by window, where that saves memory.
    Requires: ``choose-formats``.
    Refuses: nothing.
    """

    name: str = "group-caches"

    def apply(self, planning: Planning) -> PassResult:
        """Groups are chosen for the formats in which the caches are stored in the end."""
        planning.specs = _in_groups(planning.specs, planning.formats)
        return PassResult()


@dataclass(frozen=True)
class LimitLength:
    """Find the longest sequence for which everything was proven.

    Before: a plan for any length.
    After: a plan with a limit, and the reason for it.
    Requires: ``choose-storage``.
    Refuses: nothing.
    """

    name: str = "limit-length"

    def apply(self, planning: Planning) -> PassResult:
        """The smallest of all limits."""
        parts = (planning.captured, planning.inference, planning.evaluator, planning.sites, planning.config)
        planning.limit, planning.limit_reason = _longest(*parts)
        return PassResult()


def _in_groups(specs: tuple[CacheSpec, ...], formats: tuple[tuple[str, str], ...]) -> tuple[CacheSpec, ...]:
    """The caches in groups, which are chosen for the formats in which they are stored in the end."""
    stored = [
        replace(spec, key_format=key, value_format=value) for spec, (key, value) in zip(specs, formats, strict=True)
    ]
    return tuple(replace(spec, group=grouped.group) for spec, grouped in zip(specs, group_caches(stored), strict=True))


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}#{count}", count + 1
    return candidate


def _spec(heads: StoredHeads, names: list[str], windows: list[int | None], formats: tuple[str, str]) -> CacheSpec:
    key_format, value_format = (
        format_for_dtype(heads.dtype(places)) if name == "auto" else name
        for places, name in zip((heads.key_places, heads.value_places), formats, strict=True)
    )
    known = [w for w in windows if w is not None]
    return CacheSpec(
        name=names[0],
        num_kv_heads=heads.key_places.shape[0],
        key_dim=heads.key_places.shape[1],
        value_dim=0 if heads.joint else heads.value_places.shape[1],
        key_format=key_format,
        value_format=value_format,
        window=max(known) if len(known) == len(windows) else None,
        sites=tuple(names),
    )


def live_nodes(captured: CapturedGraph) -> set[Node]:
    """Nodes that the logits depend on once the masks are read: all but those behind a bias."""
    seen: set[Node] = set()
    stack = [captured.output]
    sites = set(attention_sites(captured))
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in sites:
            named = arguments(node)
            stack.extend(named[k] for k in ("query", "key", "value", "sinks") if isinstance(named[k], Node))
        elif isinstance(node.meta.get(SOURCE), Lookup):
            stack.append(node.meta[SOURCE].table)
        elif SOURCE not in node.meta:
            stack.extend(node.all_input_nodes)
    return seen


def _longest(
    captured: CapturedGraph,
    inference: Inference,
    evaluator: ShapeEvaluator,
    sites: list[SitePlan],
    config: CacheConfig,
) -> tuple[int | None, str]:
    """The longest sequence for which everything was proven, and what limits it."""
    limits: list[tuple[int, str]] = []
    if captured.max_length is not None:
        limits.append((captured.max_length, "the captured graph holds for sequences up to that length"))
    if config.max_length is not None:
        limits.append((config.max_length, "CacheConfig(max_length=...)"))
    for site in sites:
        if site.mask.limit is not None:
            why = f"the mask of {site.name} ({site.mask.describe()}) was proven up to that length"
            limits.append((site.mask.limit, f"{why}; a bias table can be made longer with CacheConfig(max_length=...)"))
    for node in live_nodes(captured):
        limit = table_limit(captured, inference, evaluator, node, config)
        if limit is not None:
            where = module_path(node, captured)
            limits.append((limit, f"a table of positions{f' in {where}' if where else ''} has no more rows"))
    return min(limits, default=(None, ""))


def table_limit(
    captured: CapturedGraph,
    inference: Inference,
    evaluator: ShapeEvaluator,
    node: Node,
    config: CacheConfig,
) -> int | None:
    """The longest sequence for which a table of positions has rows; None where the node reads none that ends."""
    source = node.meta.get(SOURCE)
    if isinstance(source, Tabulated):
        with evaluator.deciding("the positions"):
            return longest_valid(evaluator, node, config.max_length or captured.max_length or DEFAULT_TABLE_LENGTH)
    if isinstance(source, Counting):
        return source.limit
    if isinstance(source, Lookup):
        return int(shape_of(source.table)[source.dim]) - source.start
    if not is_call(node, *LOOKUPS) or inference.kinds[node] is not Dependence.SHAPE:
        return None
    table = node.args[0]
    assert isinstance(table, Node)
    rows = max(int(s) for s in shape_of(table)) if all(s.is_number for s in shape_of(table)) else 0
    upper = max(2 * rows + 1, LONGEST_PROBE)  # it may be looked up at an offset, or once for several positions
    with evaluator.deciding(None):  # what ends a table raises: its values decide nothing
        found = longest_valid(evaluator, node, upper)
    return found if found < upper else None
