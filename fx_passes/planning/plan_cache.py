"""``plan_cache``: for each attention what is stored, in which heads and format, and for how long sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from kvpass.config import CacheConfig
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, is_call, module_path, shape_of
from kvpass.fx_passes.masks.read_masks import MASK
from kvpass.fx_passes.planning.absorb import Absorption
from kvpass.fx_passes.planning.choose_formats import choose_formats, exact_formats, final_formats
from kvpass.fx_passes.planning.choose_storage import StoredHeads, store_heads
from kvpass.fx_passes.planning.group_caches import group_caches
from kvpass.fx_passes.planning.value_numbering import EntryClasses
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator
from kvpass.fx_passes.token_axis.find_positions import LONGEST_PROBE, SOURCE, Lookup, Tabulated, longest_valid
from kvpass.fx_passes.token_axis.infer_axes import Inference
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from kvpass.kernels.formats.cache_formats import format_for_dtype
from kvpass.types import CachePlan, CacheSpec, MaskMeaning

DEFAULT_TABLE_LENGTH = 2048
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


def plan_cache(captured: CapturedGraph, config: CacheConfig, vocab_size: int) -> GraphPlan:
    """Plan the caches of a proven graph.

    Args:
        captured: a graph after ``find-attention``, ``read-masks`` and ``prove-token-axis``, none of which refused.
        config: formats and block size.
        vocab_size: number of token ids.
    """
    inference = token_axes(captured)
    evaluator = ShapeEvaluator(captured, inference.kinds)
    classes = EntryClasses(inference, evaluator)
    stored: list[StoredHeads] = []
    readers: list[list[str]] = []
    windows: list[list[int | None]] = []
    sites: list[SitePlan] = []
    for node in attention_sites(captured):
        mask = node.meta[MASK]
        reading = store_heads(classes, node, mask, config)
        index = next((i for i, known in enumerate(stored) if known.same(reading.stored)), len(stored))
        if index == len(stored):  # layers that share keys and values share one cache
            stored.append(reading.stored)
            readers.append([])
            windows.append([])
        elif stored[index].structure != reading.stored.structure:
            classes.note_equal(stored[index].nodes, reading.stored.nodes)
        name = _unique(module_path(node, captured) or "attention", {s.name for s in sites})
        readers[index].append(name)
        windows[index].append(mask.reach)
        sites.append(SitePlan(node, name, index, mask, reading.head_order, reading.absorption))
    chosen = choose_formats(config, [site.cache for site in sites], len(stored))
    specs = tuple(
        _spec(heads, names, wins, wide)
        for heads, names, wins, wide in zip(stored, readers, windows, map(exact_formats, chosen), strict=True)
    )
    formats = tuple(final_formats(spec, pair) for spec, pair in zip(specs, chosen, strict=True))
    specs = _in_groups(specs, formats)
    limit, reason = _longest(captured, inference, evaluator, sites, config)
    forbidden = tuple(sorted(captured.forbidden_tokens))
    prefix = next((site.mask.prefix or 0 for site in sites), 0)
    plan = CachePlan(specs, config.block_size, vocab_size, limit, reason, forbidden, prefix)
    return GraphPlan(plan, tuple(sites), tuple(stored), inference, evaluator, formats)


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
