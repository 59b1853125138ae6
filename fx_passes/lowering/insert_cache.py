"""``insert-cache``: the graph of a whole sequence becomes the graph of one paged step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvpass.fx_passes.attention.layouts import arrange
from kvpass.fx_passes.graph import ROLE, CapturedGraph, PassResult, Role, arguments, aten, copy_graph, emit, hold
from kvpass.fx_passes.optimization.step_graph import StepGraph
from kvpass.fx_passes.planning.absorb import absorb_output, absorb_query
from kvpass.fx_passes.planning.choose_storage import StoredHeads
from kvpass.fx_passes.planning.plan_cache import GraphPlan, SitePlan, live_nodes
from kvpass.fx_passes.token_axis.axes import Factor, Kind
from kvpass.fx_passes.token_axis.find_positions import SOURCE, PositionSource, Tabulated
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes_of
from kvpass.kernels.formats.cache_formats import find_format
from kvpass.types import CachePlan, FoldedRotation

STEP_INPUTS = ("positions", "slot_mapping", "block_tables", "seq_lens", "query_start", "logits_index")

STEP_ROLES = {name: Role.STEP for name in STEP_INPUTS} | {"positions": Role.POSITIONS}


@dataclass
class PagedGraph:
    """A graph of one step.

    Attributes:
        module: takes token ids ``[1, T]``, the step's tensors in the order of :data:`STEP_INPUTS`, then keys and
            values of every cache; returns logits ``[1, R, V]``.
        plan: the caches.
        observed: the same, but returns a tuple: the logits, and the result ``[1, Hq, T, Dv]`` of each attention.
        site_names: the attentions in the order of ``observed``.
        rotations: what became of the rotations around the caches.
        derived_bytes: of the weights that rotations are part of, beside the model's own.
    """

    module: GraphModule
    plan: CachePlan
    observed: GraphModule
    site_names: tuple[str, ...]
    rotations: tuple[FoldedRotation, ...] = ()
    derived_bytes: int = 0


@dataclass(frozen=True)
class InsertCache:
    """Rewrite a planned graph to paged form.

    Before: ``kvpass::dense_attention`` over sequences; positions counted from the length.
    After: token ids are ``[1, T]``: the tokens of all sequences of the step in one row. Keys and values are written
        to their cache by ``kvpass::write_cache``, attention is ``kvpass::paged_attention``, and positions are an input.
    Requires: a plan.
    Refuses: nothing.
    """

    name: str = "insert-cache"

    def apply(self, state: StepGraph) -> PassResult:
        """Add the step's inputs, replace positions, then each attention in turn."""
        captured, plan = state.captured, state.plan
        live = live_nodes(captured)
        state.step = step = _add_inputs(captured, plan, captured.input_ids.meta["val"].device)
        groups = _select_groups(captured, plan, step)
        _replace_positions(captured, plan, live, step["positions"])
        written: set[int] = set()
        for site in plan.sites:
            with captured.graph.inserting_before(site.node):
                if site.cache not in written:
                    _write(captured, plan, plan.stored[site.cache], site, groups[site.cache])
                    written.add(site.cache)
                replacement = _attend(captured, plan, site, groups[site.cache])
            state.results.append(replacement)
            site.node.replace_all_uses_with(replacement)
            captured.graph.erase_node(site.node)
        captured.tidy()
        return PassResult(len(plan.sites))


def finished(state: StepGraph) -> PagedGraph:
    """The graph of a step as a module of logits alone, and beside it one that gives what each attention gave."""
    captured = state.captured
    observed = copy_graph(captured.graph, captured.module)
    state.end.args = ((captured.output,),)
    captured.tidy()
    names = tuple(site.name for site in state.plan.sites)
    return PagedGraph(captured.module, state.cache_plan, observed, names, state.folded, state.derived_bytes)


def _add_inputs(captured: CapturedGraph, plan: GraphPlan, device: torch.device) -> dict[str, Node]:
    graph = captured.graph
    nodes: dict[str, Node] = {}
    last = captured.position_ids or captured.input_ids
    batch, length = captured.input_ids.meta["val"].shape
    groups = len(plan.cache_plan.group_windows)
    groups *= 2 if any(find_format(keys).settles for keys, _ in plan.formats) else 1

    def add(name: str, shape: list[Any], dtype: torch.dtype) -> None:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        with captured.fake_mode:
            last.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        last.meta[ROLE] = STEP_ROLES.get(name, Role.CACHE)
        nodes[name] = last

    shapes: dict[str, list[Any]] = {
        "positions": [length],
        "slot_mapping": [groups, batch * length],  # one for each row of keys
        "block_tables": [groups, 2, 2],
        "seq_lens": [2],
        "query_start": [3],
        "logits_index": [2],
    }
    for name in STEP_INPUTS:
        add(name, shapes[name], torch.int64)
    for i, spec in enumerate(plan.cache_plan.caches):
        block = plan.cache_plan.block_size
        for part, dim, form in (("key", spec.key_dim, spec.key_format), ("value", spec.value_dim, spec.value_format)):
            add(f"{part}_cache_{i}", [2, spec.num_kv_heads, block, dim], find_format(form).dtype)
    return nodes


def _select_groups(captured: CapturedGraph, plan: GraphPlan, step: dict[str, Node]) -> list[dict[str, Node]]:
    """The step's inputs as each cache needs them: slots and block tables of its group, selected once per group.

    Blocks of a cache that settles have other numbers: its slots and tables follow those of all groups.
    """
    selected: dict[int, dict[str, Node]] = {}
    groups = len(plan.cache_plan.group_windows)
    rows = [
        spec.group + groups * (find_format(keys).settles is not None)
        for spec, (keys, _) in zip(plan.cache_plan.caches, plan.formats, strict=True)
    ]
    with captured.graph.inserting_before(
        next(n for n in captured.graph.nodes if n.op not in ("placeholder", "get_attr"))
    ):
        for row in rows:
            if row not in selected:
                chosen = {
                    name: emit(captured, aten.select.int, step[name], 0, row)
                    for name in ("slot_mapping", "block_tables")
                }
                selected[row] = {**step, **chosen}
    return [selected[row] for row in rows]


def _replace_positions(captured: CapturedGraph, plan: GraphPlan, live: set[Node], positions: Node) -> None:
    sources = [n for n in captured.graph.nodes if n in live and SOURCE in n.meta and n.users]
    rebuilt = {node: _covering(plan, node) for node in sources}  # before the graph changes
    for node, source in rebuilt.items():
        place = node if node.op != "placeholder" else next(iter(sorted(node.users)))
        with captured.graph.inserting_before(place):
            node.replace_all_uses_with(source.rebuild(captured, node, positions))


def _covering(plan: GraphPlan, node: Node) -> PositionSource:
    """The node's source; a table is computed for the longest sequence that was planned."""
    source: PositionSource = node.meta[SOURCE]
    length = plan.cache_plan.max_length
    if not isinstance(source, Tabulated):
        return source
    assert length is not None
    with plan.evaluator.deciding("the positions"):
        return Tabulated(plan.evaluator.evaluate(node, 1, length).contiguous(), source.dim)


def _write(
    captured: CapturedGraph, plan: GraphPlan, stored: StoredHeads, site: SitePlan, step: dict[str, Node]
) -> None:
    key = _rows(captured, plan, stored, stored.key_places, site.node, "key")
    if stored.joint:  # the value rows are of no width
        value = emit(captured, aten.slice.Tensor, key, 2, 0, 0, like=site.node)
    else:
        value = _rows(captured, plan, stored, stored.value_places, site.node, "value")
    caches = (step[f"key_cache_{site.cache}"], step[f"value_cache_{site.cache}"])
    emit(captured, torch.ops.kvpass.write_cache.default, key, value, *caches, step["slot_mapping"], like=site.node)


def _rows(captured: CapturedGraph, plan: GraphPlan, stored: StoredHeads, places: Tensor, like: Node, part: str) -> Node:
    """The stored heads of every token, ``[T, Hkv, D]``, from the nodes of the cut."""
    ends = [*stored.offsets[1:], stored.width]
    low, high = int(places.min()), int(places.max())
    used = [i for i, (start, end) in enumerate(zip(stored.offsets, ends, strict=True)) if start <= high and end > low]
    parts = [_row_of(captured, plan, stored.nodes[i], like) for i in used]
    row = parts[0] if len(parts) == 1 else emit(captured, aten.cat.default, parts, 2, like=like)
    wanted = places.flatten() - stored.offsets[used[0]]
    if not torch.equal(wanted, torch.arange(ends[used[-1]] - stored.offsets[used[0]])):
        row = _pick(captured, row, wanted, like, f"{part}_{like.name}")
    return emit(captured, aten.reshape.default, row, [-1, *places.shape], like=like)


def _row_of(captured: CapturedGraph, plan: GraphPlan, node: Node, like: Node) -> Node:
    axes = token_axes_of(plan.inference, node)
    atoms = [f for dim in axes for f in dim]
    batch = next(f for f in atoms if f.kind is Kind.BATCH)
    tokens = next(f for f in atoms if f.kind is Kind.TOKEN)
    named = tuple(tuple(_named(f, i, j) for j, f in enumerate(dim)) for i, dim in enumerate(axes))
    rest = [f for dim in named for f in dim if f.kind not in (Kind.BATCH, Kind.TOKEN)]
    return arrange(captured, node, named, [[batch], [tokens], rest], like)


def _named(factor: Factor, i: int, j: int) -> Factor:
    """Plain factors by their place, so that no two are equal."""
    return factor if factor.kind in (Kind.BATCH, Kind.TOKEN) else replace(factor, tag=i * 64 + j)


def _pick(captured: CapturedGraph, row: Node, wanted: Tensor, like: Node, name: str) -> Node:
    index = hold(captured, f"_places_{name}", wanted.to(like.meta["val"].device))
    return emit(captured, aten.index_select.default, row, 2, index, like=like)


def _attend(captured: CapturedGraph, plan: GraphPlan, site: SitePlan, step: dict[str, Node]) -> Node:
    """The paged attention of a site; its result is in the canonical layout."""
    node, mask = site.node, site.mask
    named = arguments(node)
    order = None if site.head_order is None else torch.tensor(site.head_order, device=node.meta["val"].device)
    query, sinks = named["query"], named["sinks"]
    slopes, bias = mask.slopes, mask.bias
    heads, head_dim = (int(query.meta["val"].shape[i]) for i in (1, 3))
    width = int(node.meta["val"].shape[3])
    if order is not None:
        index = hold(captured, f"_head_order_{node.name}", order)
        query = emit(captured, aten.index_select.default, query, 1, index, like=node)
        sinks = None if sinks is None else emit(captured, aten.index_select.default, sinks, 0, index, like=node)
        slopes = None if slopes is None else slopes.to(order.device)[order]
        bias = bias if bias is None or bias.shape[0] == 1 else bias.to(order.device)[order]
    flat = emit(captured, aten.transpose.int, query, 1, 2, like=node)
    flat = emit(captured, aten.reshape.default, flat, [-1, heads, head_dim], like=node)
    if site.absorption is not None:
        flat = absorb_query(captured, site.absorption, flat, node)
    stored = plan.stored[site.cache]
    keys, values = step[f"key_cache_{site.cache}"], step[f"value_cache_{site.cache}"]
    steps = (step["block_tables"], step["seq_lens"], step["query_start"])
    rest = (
        named["softcap"],
        mask.window,
        _table(captured, slopes, f"_slopes_{node.name}", node),
        sinks,
        _table(captured, bias, f"_bias_{node.name}", node),
    )
    ops = torch.ops.kvpass
    if stored.joint and len(stored.key_places) == 1:
        target = ops.latent_attention.default
        read: tuple[Any, ...] = (flat, keys, *steps, named["scale"], stored.value_places.shape[1])
    else:  # heads of values that are part of the keys are read as wide as those
        target = ops.paged_attention.default
        read = (flat, keys, keys if stored.joint else values, *steps, named["scale"])
    more = {} if mask.chunk is None else {"chunk": mask.chunk}
    paged = emit(captured, target, *read, *rest, like=node, **more)
    if site.absorption is not None:
        paged = absorb_output(captured, site.absorption, paged, node)
    sizes = [captured.size("batch"), captured.size("length"), heads, width]
    result = emit(captured, aten.reshape.default, paged, sizes, like=node)
    result = emit(captured, aten.transpose.int, result, 1, 2, like=node)
    if order is not None:
        inverse = hold(captured, f"_head_places_{node.name}", torch.argsort(order))
        result = emit(captured, aten.index_select.default, result, 1, inverse, like=node)
    return result


def _table(captured: CapturedGraph, value: Tensor | None, name: str, like: Node) -> Node | None:
    """A tensor of the mask's meaning; sites with one and the same tensor share it."""
    if value is None:
        return None
    for known, buffer in captured.module.named_buffers():
        if buffer is value:
            name = known
            break
    return hold(captured, name, value)
