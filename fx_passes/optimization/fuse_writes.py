"""``fuse-writes``: norm, rotary embedding and cache write of an attention become one op."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, arguments, aten, emit, hold, is_call, shape_of
from kvpass.fx_passes.optimization.analytic_slices import Origin, Segment, origins_of, segments_before
from kvpass.fx_passes.optimization.read_rotation import Columns, Rotation, read_rotation
from kvpass.fx_passes.optimization.step_graph import StepGraph

ops = torch.ops.kvpass
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the op computes in float32


@dataclass(frozen=True)
class FuseWrites:
    """Fuse what stands before an attention and its cache write.

    Before: queries and keys that were normed, rotated, or both, the keys written by ``kvpass::write_cache``.
    After: ``kvpass::norm_rotary_write`` takes them as they were before, writes, and gives the queries.
    Requires: the graph of a paged step, formats stored.
    Refuses: nothing. What is not proven to be the op's formula, of queries and keys alike, stays as it is.

    Attributes:
        enabled: whether the device has a kernel for the fused op.
    """

    enabled: bool = True
    name: str = "fuse-writes"

    def apply(self, step: StepGraph) -> PassResult:
        """Try each write, in the order of the attentions that read it."""
        return PassResult(fuse_writes(step.captured) if self.enabled else 0)


def fuse_writes(captured: CapturedGraph) -> int:
    """Fuse what stands before an attention and its cache write; gives how many writes were fused."""
    fusion = _Fusion(captured, origins_of(captured))
    pairs = [(node, _first_reader(node)) for node in captured.graph.nodes if is_call(node, ops.write_cache)]
    ordered = sorted((read, write) for write, read in pairs if read is not None)
    fused = sum(fusion.fuse(write, read) for read, write in ordered)
    if fused:
        captured.tidy()
    return fused


def _first_reader(write: Node) -> Node | None:
    """The attention that first reads what is written; None if it reads another part of it as well."""
    cache = arguments(write)["key_cache"]
    readers = sorted(user for user in cache.users if user is not write)
    return readers[0] if readers and is_call(readers[0], ops.paged_attention) and readers[0] > write else None


def _has_heads(rows: Node) -> bool:
    """Whether rows are ``[T, H, D]`` as they stand; one head may be left out, with batch and length in its place."""
    sizes = shape_of(rows)
    return len(sizes) == 3 and all(size.is_number for size in sizes[1:])


@dataclass
class _Fusion:
    """One run of the pass: what was read of equal layers, and the tables in the op's layout, are shared."""

    captured: CapturedGraph
    origins: dict[Node, Origin]
    known: dict[Hashable, Rotation | None] = field(default_factory=dict)
    tables: dict[tuple[Node, Columns], Node] = field(default_factory=dict)

    def fuse(self, write: Node, read: Node) -> bool:
        """Put the fused op before the attention ``read``, if it is proven to compute the same."""
        named = arguments(write)
        query, key = arguments(read)["query"], named["key"]
        if not all(_has_heads(rows) for rows in (query, key, named["value"])):
            return False
        of_query, of_key = self.read(query), self.read(key)
        if of_query is None or of_key is None:
            return False
        dtypes = {node.meta["val"].dtype for node in (query, of_query[0].source, of_key[0].source)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return False
        angles = self.angles(*of_query)
        eps = {rotation.eps for _, rotation in (of_query, of_key) if rotation.weight is not None}
        alike = angles == self.angles(*of_key) and of_query[1].interleaved == of_key[1].interleaved
        if not alike or len(eps) > 1:
            return False
        with self.captured.graph.inserting_before(read):
            rows = (self.heads(of_query[0]), self.heads(of_key[0]), named["value"])
            weights = (self.weight(*of_query), self.weight(*of_key))
            cos, sin = (None if where is None else self.table(*where, read) for where in angles)
            caches = (named["key_cache"], named["value_cache"], named["slot_mapping"])
            turning = (*weights, max(eps, default=0.0), cos, sin, of_key[1].interleaved)
            formats = {name: named[name] for name in ("key_format", "value_format") if named[name] is not None}
            turned = self.emit(ops.norm_rotary_write.default, *rows, *caches, *turning, like=read, **formats)
        read.replace_input_with(query, turned)
        self.captured.graph.erase_node(write)
        return True

    def read(self, rows: Node) -> tuple[Segment, Rotation] | None:
        """The longest segment before ``rows [T, H, D]`` that the op can compute."""
        heads, width = (int(size) for size in shape_of(rows)[1:])
        for segment in segments_before(self.captured, self.origins, rows):
            sizes = segment.sizes(segment.source, 1)
            if torch.Size(sizes).numel() != heads * width:
                continue
            kinds = tuple((self.origins[n], n.meta["val"].dtype.is_complex) for n in segment.inputs)
            key = (segment.key(), kinds, heads, width)
            if key not in self.known:
                self.known[key] = self.try_to_read(segment, heads, width)
            rotation = self.known[key]
            if rotation is not None:
                return segment, rotation
        return None

    def try_to_read(self, segment: Segment, heads: int, width: int) -> Rotation | None:
        try:
            return read_rotation(segment, self.origins, heads, width)
        except (RuntimeError, TypeError, ValueError):  # an op that does not take float64, or these sizes
            return None

    def angles(self, segment: Segment, rotation: Rotation) -> list[tuple[Node, Columns] | None]:
        """The tables of a rotation, which queries and keys must agree on."""
        columns = (rotation.cos, rotation.sin)
        return [None if of is None else (segment.inputs[of.table], replace(of, table=0)) for of in columns]

    def heads(self, segment: Segment) -> Node:
        """The source as ``[T, H, D]``."""
        heads, width = (int(size) for size in shape_of(segment.result)[1:])
        node = self.tokens_first(segment.source)
        return self.emit(aten.reshape.default, node, [-1, heads, width], like=segment.result)

    def tokens_first(self, node: Node) -> Node:
        sizes = shape_of(node)
        (dim,) = (i for i, size in enumerate(sizes) if self.captured.length in size.free_symbols)
        before = [i for i in range(dim) if sizes[i] not in (1, self.captured.batch)]
        order = [dim, *(i for i in range(len(sizes)) if i != dim)]
        return self.emit(aten.permute.default, node, order, like=node) if before else node

    def weight(self, segment: Segment, rotation: Rotation) -> Node | None:
        """The norm's weight, ``[D]``."""
        if rotation.weight is None:
            return None
        width = int(shape_of(segment.result)[2])
        if rotation.weight < 0:
            return self.buffer(f"_ones_{width}", torch.ones(width), segment.result)
        node = segment.inputs[rotation.weight]
        return node if len(shape_of(node)) == 1 else self.emit(aten.reshape.default, node, [width], like=node)

    def table(self, node: Node, columns: Columns, like: Node) -> Node:
        """Entries of a table of positions, float32 ``[T, Dr]``."""
        if (node, columns) not in self.tables:
            rows = node
            if node.meta["val"].dtype.is_complex:
                rows = self.emit(aten.view_as_real.default, rows, like=node)
            rows = self.tokens_first(rows)
            width = int(torch.Size([int(s) for s in shape_of(rows) if s.is_number]).numel())
            rows = self.emit(aten.reshape.default, rows, [-1, width], like=node)
            if rows.meta["val"].dtype is not torch.float32:
                rows = self.emit(aten._to_copy.default, rows, like=node, dtype=torch.float32)
            if columns.places != tuple(range(width)):
                name = f"_columns_{node.name}_{len(self.tables)}"
                places = self.buffer(name, torch.tensor(columns.places), like)
                rows = self.emit(aten.index_select.default, rows, 1, places, like=node)
            if columns.sign < 0:
                rows = self.emit(aten.neg.default, rows, like=node)
            self.tables[node, columns] = rows
        return self.tables[node, columns]

    def buffer(self, name: str, value: Tensor, like: Node) -> Node:
        """A node that reads a tensor of the rewrite's own."""
        known = hasattr(self.captured.module, name)
        return hold(self.captured, name, None if known else value.to(like.meta["val"].device))

    def emit(self, target: Any, *args: Any, like: Node, **options: Any) -> Node:
        return emit(self.captured, target, *args, like=like, **options)
