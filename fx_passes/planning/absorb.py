"""Weight absorption: attention over the stored row, the weights of keys and values moved to query and output.

Where a head's keys are ``K = A r`` of a token's stored row ``r``, scores are ``q . A r = (A^T q) . r``: the query is
brought to the row's entries once, and no key is ever computed. Where its values are ``V = B r + b``, the output is
``sum_k p_k (B r_k + b) = B (sum_k p_k r_k) + b``, the weights of a softmax without a sink being 1 together. What is
added to all keys adds the same to all scores of a query, which a softmax does not see. With one latent vector per token
beside a part that all heads share, this is absorbed multi-head latent attention (arXiv 2405.04434, section 2.1).

The matrices are views of the model's own weights, taken in the graph: no second copy is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, aten, emit, hold, shape_of
from kvpass.fx_passes.planning.linear_forms import Constants, Form, Joined, Mapped, Row, Scaled, computes


@dataclass(frozen=True, eq=False)
class Absorption:
    """How an attention reads the stored row.

    Attributes:
        key: keys ``[U, D]`` of the heads; the places of its rows are ``[1, n]``: columns of a stored key row.
        value: values ``[U, Dv]``, from columns of a stored value row.
        heads: U; query heads come in U groups of equal size, one after the other.
        key_width: entries of a stored key row.
    """

    key: Form
    value: Form
    heads: int
    key_width: int

    @property
    def has_weights(self) -> bool:
        """Whether queries or outputs are computed with, and not only moved."""
        return computes(self.key) or computes(self.value)


def absorb_query(captured: CapturedGraph, absorption: Absorption, query: Node, like: Node) -> Node:
    """Queries of the stored key rows ``[T, Hq, key_width]``, from queries ``[T, Hq, D]`` of the keys."""
    builder = _Builder(captured, absorption.heads, like)
    parts: list[tuple[list[int], Node]] = []
    builder.transposed(absorption.key, query, parts)
    result = builder.join(parts, absorption.key_width)
    return builder.cast(result, query.meta["val"].dtype)


def absorb_output(captured: CapturedGraph, absorption: Absorption, rows: Node, like: Node) -> Node:
    """Outputs ``[T, Hq, Dv]``, from sums ``[T, Hq, value row]`` over stored value rows."""
    builder = _Builder(captured, absorption.heads, like)
    return builder.cast(builder.forward(absorption.value, rows), rows.meta["val"].dtype)


@dataclass(frozen=True)
class _Builder:
    """Inserts ops at the graph's insertion point."""

    captured: CapturedGraph
    heads: int
    like: Node

    def transposed(self, form: Form, given: Node, parts: list[tuple[list[int], Node]]) -> None:
        """Bring ``[T, Hq, n]``, to be multiplied with a form's entries, to the columns that these come from."""
        if isinstance(form, Row):
            parts.append((form.places[0].tolist(), given))
        elif isinstance(form, Joined):
            for columns, part in zip(form.columns, form.parts, strict=True):
                self.transposed(part, self.take(given, columns), parts)
        elif isinstance(form, Mapped):
            self.transposed(form.source, self.multiply(given, self.weights(form.weights)), parts)
        elif isinstance(form, Scaled):
            self.transposed(form.source, self.scale(given, form), parts)
        else:
            self.transposed(form.source, given, parts)  # the same for all keys: no softmax sees it

    def forward(self, form: Form, row: Node) -> Node:
        """Entries ``[T, Hq, n]`` of a form, of a row ``[T, Hq, W]``."""
        if isinstance(form, Row):
            return self.take(row, form.places[0].tolist())
        if isinstance(form, Joined):
            parts = [(list(c), self.forward(p, row)) for c, p in zip(form.columns, form.parts, strict=True)]
            return self.join(parts, sum(map(len, form.columns)))
        source = self.forward(form.source, row)
        if isinstance(form, Mapped):
            weights = self.emit(aten.transpose.int, self.weights(form.weights), -1, -2)
            return self.multiply(source, weights)
        if isinstance(form, Scaled):
            return self.scale(source, form)
        return self.by_head(aten.add.Tensor, source, form.shift, alpha=form.alpha)

    def scale(self, node: Node, form: Scaled) -> Node:
        return self.by_head(aten.div.Tensor if form.divides else aten.mul.Tensor, node, form.factor)

    def multiply(self, node: Node, matrices: Node) -> Node:
        """``[T, Hq, n]`` times ``[U, n, m]``, each head its own, or ``[1, n, m]`` for all of them."""
        node = self.cast(node, matrices.meta["val"].dtype)
        count, _, width = (int(s) for s in shape_of(matrices))
        heads = int(shape_of(node)[1])
        if count == 1:
            return self.emit(aten.matmul.default, node, self.emit(aten.select.int, matrices, 0, 0))
        if heads == count:
            product = self.emit(aten.matmul.default, self.emit(aten.transpose.int, node, 0, 1), matrices)
            return self.emit(aten.transpose.int, product, 0, 1)
        group, summed = heads // count, int(shape_of(node)[2])
        split = self.emit(aten.reshape.default, node, [-1, count, group, summed])
        by_matrix = self.emit(aten.transpose.int, split, 0, 1)
        rows = self.emit(aten.reshape.default, by_matrix, [count, -1, summed])
        product = self.emit(aten.matmul.default, rows, matrices)
        spread = self.emit(aten.reshape.default, product, [count, -1, group, width])
        return self.emit(aten.reshape.default, self.emit(aten.transpose.int, spread, 0, 1), [-1, heads, width])

    def by_head(self, op: Any, node: Node, constants: float | Constants, **options: float) -> Node:
        """An op of ``[T, Hq, n]`` with a number, or with constants ``[U, n]``."""
        if not isinstance(constants, Constants):
            return self.emit(op, node, constants, **options)
        if torch.equal(constants.places[:, :1].expand_as(constants.places), constants.places):
            constants = replace(constants, places=constants.places[:, :1])
        shape = [self.count(constants), constants.places.shape[1]]
        chosen = self.emit(aten.reshape.default, self.weights(constants), shape)
        heads, width = (int(s) for s in shape_of(node)[1:])
        group = heads // self.heads
        if group == 1 or self.count(constants) == 1:
            return self.emit(op, node, chosen, **options)
        split = self.emit(aten.reshape.default, node, [-1, self.heads, group, width])
        result = self.emit(op, split, self.emit(aten.unsqueeze.default, chosen, 1), **options)
        return self.emit(aten.reshape.default, result, [-1, heads, width])

    def weights(self, constants: Constants) -> Node:
        """Chosen columns of a constant tensor, ``[U, n, K]``; ``[1, n, K]`` where all heads have the same."""
        places = constants.places[: self.count(constants)]
        matrix = self.columns_last(constants)
        return self.view_of(matrix, places) or self.copy_of(matrix, places)

    @staticmethod
    def count(constants: Constants) -> int:
        places = constants.places
        return 1 if torch.equal(places[:1].expand_as(places), places) else len(places)

    def columns_last(self, constants: Constants) -> Node:
        """The tensor as ``[columns, K]``, or ``[G, columns, K]`` where its first dim counts matrices."""
        node = constants.node
        if constants.dim is None:
            return self.emit(aten.reshape.default, node, [-1, 1])
        if constants.dim == -2:
            node = self.emit(aten.transpose.int, node, -1, -2)
        sizes = [int(s) for s in shape_of(node)]
        batch = [s for s in sizes[:-2] if s != 1]
        if len(batch) == len(sizes) - 2 and len(batch) < 2:
            return node
        return self.emit(aten.reshape.default, node, [*([-1] if batch else []), *sizes[-2:]])

    def view_of(self, matrix: Node, places: Tensor) -> Node | None:
        """Columns that stand in a regular grid, without a copy."""
        heads, count = places.shape
        base = int(places[0, 0])
        of_head = int(places[1, 0]) - base if heads > 1 else 0
        of_entry = int(places[0, 1]) - base if count > 1 else 0
        grid = base + torch.arange(heads)[:, None] * of_head + torch.arange(count) * of_entry
        if not torch.equal(grid, places):
            return None
        across = heads > 1 and of_head == 1 and of_entry > 1  # entries of different heads stand together
        outer, inner = (count, heads) if across else (heads, count)
        step, along = (of_entry, of_head) if across else (of_head, of_entry)
        if inner > 1 and along != 1:
            return None
        chosen = self.blocks(matrix, base, outer, inner, step)
        return self.emit(aten.transpose.int, chosen, 0, 1) if chosen is not None and across else chosen

    def blocks(self, matrix: Node, base: int, outer: int, inner: int, step: int) -> Node | None:
        """``[outer, inner, K]``: from column ``base`` on, ``inner`` columns at every ``step``-th."""
        sizes = [int(s) for s in shape_of(matrix)]
        if len(sizes) == 3:
            step = sizes[1] if outer == 1 else step
            if step != sizes[1] or base % step + inner > step:
                return None
            return self.cut(self.cut(matrix, 0, base // step, outer), 1, base % step, inner)
        if outer == 1 or step == inner:
            run = self.cut(matrix, 0, base, outer * inner)
            return self.emit(aten.reshape.default, run, [outer, inner, sizes[1]])
        if step < 1 or sizes[0] % step or base % step + inner > step:
            return None
        split = self.emit(aten.reshape.default, matrix, [sizes[0] // step, step, sizes[1]])
        return self.cut(self.cut(split, 0, base // step, outer), 1, base % step, inner)

    def copy_of(self, matrix: Node, places: Tensor) -> Node:
        """Columns in no order, gathered anew in every step."""
        width = int(shape_of(matrix)[-1])
        flat = self.emit(aten.reshape.default, matrix, [-1, width])
        chosen = self.emit(aten.index_select.default, flat, 0, self.index(places.flatten().tolist()))
        return self.emit(aten.reshape.default, chosen, [*places.shape, width])

    def join(self, parts: Sequence[tuple[list[int], Node]], width: int) -> Node:
        """``[T, Hq, width]``, each part's columns in their places; a column of several is their sum, one of none 0."""
        merged: dict[tuple[int, ...], Node] = {}
        for columns, node in parts:
            known = merged.get(tuple(columns))
            merged[tuple(columns)] = node if known is None else self.emit(aten.add.Tensor, known, node)
        dtype = functools.reduce(torch.promote_types, (node.meta["val"].dtype for node in merged.values()))
        placed: list[int] = []
        nodes: list[Node] = []
        rest: list[tuple[tuple[int, ...], Node]] = []
        for own, node in merged.items():
            if set(own) & set(placed) or len(set(own)) < len(own):
                rest.append((own, self.cast(node, dtype)))
            else:
                placed += own
                nodes.append(self.cast(node, dtype))
        missing = sorted(set(range(width)) - set(placed))
        nodes = nodes or [self.cut(rest[0][1], 2, 0, 0)]
        result = nodes[0] if len(nodes) == 1 else self.emit(aten.cat.default, nodes, 2)
        if missing:
            result = self.emit(aten.constant_pad_nd.default, result, [0, len(missing)])
        at = {column: i for i, column in enumerate([*placed, *missing])}
        result = self.take(result, [at[column] for column in range(width)])
        for own, node in rest:
            result = self.emit(aten.index_add.default, result, 2, self.index(own), node)
        return result

    def take(self, node: Node, columns: Sequence[int]) -> Node:
        """Columns of the last dim of ``[T, Hq, n]``."""
        if list(columns) == list(range(columns[0], columns[0] + len(columns))):
            return self.cut(node, 2, columns[0], len(columns))
        return self.emit(aten.index_select.default, node, 2, self.index(columns))

    def cut(self, node: Node, dim: int, start: int, count: int) -> Node:
        whole = start == 0 and count == shape_of(node)[dim]
        return node if whole else self.emit(aten.slice.Tensor, node, dim, start, start + count)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if node.meta["val"].dtype == dtype else self.emit(aten._to_copy.default, node, dtype=dtype)

    def index(self, places: Sequence[int]) -> Node:
        """A tensor of places, kept by the module."""
        module = self.captured.module
        name = f"_absorbed_{self.like.name}_{sum(1 for _ in module.named_buffers())}"
        value = torch.tensor(places, device=self.like.meta["val"].device)
        return hold(self.captured, name, value)

    def emit(self, target: Any, *args: Any, **options: Any) -> Node:
        return emit(self.captured, target, *args, like=self.like, **options)
