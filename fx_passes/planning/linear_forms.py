"""Keys and values as linear maps of something narrower, read from the graph.

Multi-head latent attention computes the keys and values of all heads from one narrow vector per token, by a matrix of
weights, beside moves, scale factors and a bias. A :class:`Form` says so for some entries of a node, head by head: which
entries of the token's row they follow from, and by which weights. It is read op by op; no name and no spelling is
known, only what each op does to numbered entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, is_call, tensor_value
from kvpass.fx_passes.planning.minimum_cut import (
    BATCH,
    LENGTH,
    entries_per_token,
    has_tokens,
    is_move,
    numbered,
    offsets_of,
    run_moves,
    token_inputs,
)
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator
from kvpass.fx_passes.token_axis.contraction import Contraction, contraction_of
from kvpass.fx_passes.token_axis.infer_axes import Inference


class NotLinear(Exception):
    """The entries are no linear map of the stored row, or not one that can be absorbed."""


@dataclass(frozen=True, eq=False)
class Row:
    """Entries of the stored row: ``places`` int64 ``[U, n]``, for each of U heads which entry it is."""

    places: Tensor


@dataclass(frozen=True, eq=False)
class Joined:
    """Entries put together: part i gives the columns ``columns[i]`` of n."""

    columns: tuple[tuple[int, ...], ...]
    parts: tuple[Form, ...]


@dataclass(frozen=True, eq=False)
class Constants:
    """Entries of a tensor that depends on nothing: weights, biases, factors.

    Attributes:
        node: the tensor.
        dim: the dim along which a column is summed over with the operand; None for single numbers.
        places: int64 ``[U, n]``: which column, counted over all other dims of the tensor in order.
    """

    node: Node
    dim: int | None
    places: Tensor


@dataclass(frozen=True, eq=False)
class Mapped:
    """``y[u, j] = sum_k weights[u, j, k] * source[u, k]``."""

    source: Form
    weights: Constants


@dataclass(frozen=True, eq=False)
class Scaled:
    """The source times a number or constants, or divided by them."""

    source: Form
    factor: float | Constants
    divides: bool = False


@dataclass(frozen=True, eq=False)
class Shifted:
    """The source plus ``alpha`` times a number or constants."""

    source: Form
    shift: float | Constants
    alpha: float = 1.0


@dataclass(frozen=True, eq=False)
class Product:
    """A product of a token's entries with constant weights, entry by entry.

    Attributes:
        source: the operand that depends on the tokens.
        weights: the other one.
        summed: the dim of the weights that is summed over.
        rows: int64 ``[R, K]``: rows of the operand, by the numbers of their entries.
        row_of: int64 ``[n]``: the row of each entry of the first token's result.
        column_of: int64 ``[n]``: the column of the weights, counted over all dims but the summed one.
    """

    source: Node
    weights: Node
    summed: int
    rows: Tensor
    row_of: Tensor
    column_of: Tensor


Form = Row | Joined | Mapped | Scaled | Shifted


def is_shifted(form: Form) -> bool:
    """Whether something is added that does not come from the row."""
    if isinstance(form, Joined):
        return any(is_shifted(part) for part in form.parts)
    return isinstance(form, Shifted) or (isinstance(form, Mapped | Scaled) and is_shifted(form.source))


def computes(form: Form) -> bool:
    """Whether anything but picking entries of the row is done."""
    return any(map(computes, form.parts)) if isinstance(form, Joined) else not isinstance(form, Row)


def row_places(form: Form) -> list[Tensor]:
    """Entries of the row that a form reads: tensors ``[U, n]``, in the order of its parts."""
    if isinstance(form, Row):
        return [form.places]
    if isinstance(form, Joined):
        return [places for part in form.parts for places in row_places(part)]
    return row_places(form.source)


def with_places(form: Form, row: Callable[[Tensor], Tensor], constants: Callable[[Tensor], Tensor]) -> Form:
    """The form with other places in the row, and others in the constants."""
    if isinstance(form, Row):
        return Row(row(form.places))
    if isinstance(form, Joined):
        return Joined(form.columns, tuple(with_places(part, row, constants) for part in form.parts))
    source = with_places(form.source, row, constants)

    def moved(value: float | Constants) -> float | Constants:
        return replace(value, places=constants(value.places)) if isinstance(value, Constants) else value

    if isinstance(form, Mapped):
        return Mapped(source, replace(form.weights, places=constants(form.weights.places)))
    if isinstance(form, Scaled):
        return Scaled(source, moved(form.factor), form.divides)
    return Shifted(source, moved(form.shift), form.alpha)


def is_linear(inference: Inference, node: Node) -> bool:
    """Whether an op is linear in one operand that depends on the tokens, all others being constants."""
    contraction = contraction_of(node)
    value = tensor_value(node)
    if value is None or not value.is_floating_point() or (contraction is None and not is_call(node, *POINTWISE)):
        return False
    named = arguments(node)
    if contraction is not None:
        operands = [contraction.left, contraction.right]
    else:
        operands = [named[name] for name in ("self", "other") if name in named]
    if [inference.is_data(n) for n in operands].count(True) != 1 or named.get("rounding_mode") is not None:
        return False
    if is_call(node, aten.div) and not inference.is_data(named["self"]):
        return False
    if not all(isinstance(n, Node | int | float) for n in operands):
        return False
    (source,) = token_inputs(inference, node)
    others = [n for n in node.all_input_nodes if n is not source]
    if not source.meta["val"].is_floating_point():
        return False
    return all(inference.kinds[n] is Dependence.CONSTANT for n in others)


class FormReader:
    """Reads the entries of nodes as forms over the rows of one cut.

    Args:
        inference: axes of the graph's nodes.
        evaluator: for indices that moves read.
        nodes: the nodes of the cut.
    """

    def __init__(self, inference: Inference, evaluator: ShapeEvaluator, nodes: tuple[Node, ...]) -> None:
        self.inference = inference
        self.evaluator = evaluator
        self.offsets = dict(zip(nodes, offsets_of(inference, nodes)[0], strict=True))
        self.moved: dict[Node, tuple[list[Node], Tensor]] = {}

    def read(self, node: Node, places: Tensor) -> Form:
        """The entries ``places`` ``[U, n]`` of a node.

        Raises:
            NotLinear: if they have no form.
        """
        if node in self.offsets:
            return Row(places + self.offsets[node])
        if is_move(node):
            return self._read_moved(node, places)
        if not is_linear(self.inference, node):
            raise NotLinear(f"{node} is computed")
        contraction = contraction_of(node)
        if contraction is not None:
            return self._read_product(node, contraction, places)
        return POINTWISE[getattr(node.target, "overloadpacket", None)](self, node, places)

    def _read_moved(self, node: Node, places: Tensor) -> Form:
        if node not in self.moved:
            self.moved[node] = self.trace(node)
        bases, origin = self.moved[node]
        widths = torch.tensor([entries_per_token(self.inference, base) for base in bases])
        ends = widths.cumsum(0)
        entries = origin[places]
        base_of = torch.bucketize(entries, ends, right=True)
        stored = torch.tensor([base in self.offsets for base in bases])
        offsets = torch.tensor([self.offsets.get(base, 0) for base in bases]) - (ends - widths)
        group = torch.where(stored[base_of], -1, base_of)  # all nodes of the cut are one row
        if not torch.equal(group[:1].expand_as(group), group):
            raise NotLinear("heads are put together in different ways")
        columns: list[tuple[int, ...]] = []
        parts: list[Form] = []
        for which in dict.fromkeys(group[0].tolist()):
            chosen = (group[0] == which).nonzero()[:, 0]
            own = (entries + offsets[base_of])[:, chosen]
            columns.append(tuple(chosen.tolist()))
            parts.append(Row(own) if which < 0 else self.read(bases[which], own))
        return parts[0] if len(parts) == 1 else Joined(tuple(columns), tuple(parts))

    def trace(self, target: Node) -> tuple[list[Node], Tensor]:
        """The nodes that moves take the target from, and which of their entries, one node after the other, each is."""
        bases: list[Node] = []
        stack, seen = [target], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.offsets or not is_move(node):
                bases.append(node)
            else:
                stack.extend(token_inputs(self.inference, node))
        if not all(isinstance(tensor_value(n), Tensor) and has_tokens(self.inference, n) for n in bases):
            raise NotLinear("something that has no tokens is moved")
        widths = [entries_per_token(self.inference, node) for node in bases]
        total = sum(widths)
        env: dict[Node, Any] = {
            node: numbered(self.inference, self.evaluator, node, sum(widths[:i]), total) for i, node in enumerate(bases)
        }
        return bases, self._by_place(target, run_moves(self.inference, self.evaluator, target, env), total)

    def _by_place(self, node: Node, numbers: Tensor, total: int) -> Tensor:
        """The entry of the same token's row that each entry of the node is, by the place of the node's entry."""
        width = entries_per_token(self.inference, node)
        own = numbered(self.inference, self.evaluator, node, 0, width).flatten()
        numbers = numbers.flatten()
        if (numbers < 0).any() or not torch.equal(numbers // total, own // width):
            raise NotLinear(f"{node} holds entries of other tokens, or constants")
        result = torch.empty(BATCH * LENGTH, width, dtype=torch.int64)
        result.view(-1)[own] = numbers % total
        if not torch.equal(result[:1].expand_as(result), result):
            raise NotLinear(f"{node} is put together differently from token to token")
        return result[0]

    def where(self, node: Node, places: Tensor) -> Tensor:
        """Index into the flattened node of the first token's entries ``places``."""
        width = entries_per_token(self.inference, node)
        own = numbered(self.inference, self.evaluator, node, 0, width).flatten()
        result = torch.empty(BATCH * LENGTH * width, dtype=torch.int64)
        result[own] = torch.arange(len(own))
        return result[:width][places]

    def numbers_of(self, node: Node) -> Tensor:
        """A data node's tensor with every entry replaced by token times width plus place."""
        if not has_tokens(self.inference, node):
            raise NotLinear(f"{node} has no tokens")
        return numbered(self.inference, self.evaluator, node, 0, entries_per_token(self.inference, node))

    def shape(self, node: Node) -> list[int]:
        """The node's shape at the batch size and length of the numbers."""
        return [self.evaluator.number(s, BATCH, LENGTH) for s in node.meta["val"].shape]

    def read_source(self, node: Node, source: Node, numbers: Tensor) -> Form:
        """The form of entries ``[U, n]`` of an operand, given by their numbers, all of the first token."""
        width = entries_per_token(self.inference, source)
        if (numbers >= width).any():
            raise NotLinear(f"{node} reads other tokens")
        return self.read(source, numbers)

    def _read_product(self, node: Node, contraction: Contraction, places: Tensor) -> Form:
        product = self.product(node, contraction)
        row_of = product.row_of[places]
        first = product.rows[row_of[:, 0]]
        for other in row_of.T:
            if not torch.equal(other, row_of[:, 0]) and not torch.equal(product.rows[other], first):
                raise NotLinear("entries of one head are maps of different entries")
        source = self.read_source(node, product.source, first)
        form: Form = Mapped(source, Constants(product.weights, product.summed, product.column_of[places]))
        if contraction.alpha != 1:
            form = Scaled(form, contraction.alpha)
        if contraction.added is not None and contraction.beta != 0:
            form = Shifted(form, self.constants(contraction.added, node, places), contraction.beta)
        return form

    def product(self, node: Node, contraction: Contraction) -> Product:
        """What each entry of a product with constant weights is made of."""
        left, right = contraction.left, contraction.right
        from_left = self.inference.is_data(left)
        source, weights = (left, right) if from_left else (right, left)
        if contraction.vector or len(self.shape(weights)) < 2:
            raise NotLinear("a product with a vector")
        numbers = self.numbers_of(source)  # brought to [..., M, K], or to [..., N, K]
        if not from_left and not contraction.right_is_transposed:
            numbers = numbers.transpose(-1, -2)
        summed = -2 if from_left and not contraction.right_is_transposed else -1  # dim of the weights
        sizes = self.shape(weights)
        columns = _counted([size for i, size in enumerate(sizes) if i != len(sizes) + summed])
        shape = self.shape(node)  # [..., M, N]
        where = self.where(node, torch.arange(entries_per_token(self.inference, node)))
        along, across = (-1, -2) if from_left else (-2, -1)
        row_of = _counted(numbers.shape[:-1]).unsqueeze(along).expand(shape).flatten()[where]
        column_of = columns.unsqueeze(across).expand(shape).flatten()[where]
        return Product(source, weights, summed, numbers.flatten(0, -2), row_of, column_of)

    def constants(self, value: Any, node: Node, places: Tensor) -> float | Constants:
        """What a constant operand of a broadcasting op gives for entries of the result."""
        if not isinstance(value, Node):
            return float(value)
        flat = _counted(self.shape(value)).expand(self.shape(node)).flatten()
        return Constants(value, None, flat[self.where(node, places)])

    def operand(self, source: Node, node: Node, places: Tensor) -> Form:
        """The form of a data operand of a broadcasting op."""
        numbers = self.numbers_of(source).expand(self.shape(node)).flatten()
        return self.read_source(node, source, numbers[self.where(node, places)])


def _counted(shape: Sequence[int]) -> Tensor:
    """A tensor whose entries are their own places."""
    return torch.arange(math.prod(shape)).view(*shape)


def _scaled(reader: FormReader, node: Node, places: Tensor) -> Form:
    named = arguments(node)
    a, b = named["self"], named["other"]
    if not reader.inference.is_data(a):
        a, b = b, a
    return Scaled(reader.operand(a, node, places), reader.constants(b, node, places), is_call(node, aten.div))


def _shifted(reader: FormReader, node: Node, places: Tensor) -> Form:
    named = arguments(node)
    a, b, alpha = named["self"], named["other"], float(named.get("alpha", 1))
    if is_call(node, aten.sub):
        alpha = -alpha
    if reader.inference.is_data(a):
        return Shifted(reader.operand(a, node, places), reader.constants(b, node, places), alpha)
    form = reader.operand(b, node, places)
    return Shifted(form if alpha == 1 else Scaled(form, alpha), reader.constants(a, node, places))


def _negated(reader: FormReader, node: Node, places: Tensor) -> Form:
    source = node.args[0]
    assert isinstance(source, Node)
    return Scaled(reader.operand(source, node, places), -1.0)


POINTWISE: dict[object, Callable[[FormReader, Node, Tensor], Form]] = {
    aten.mul: _scaled,
    aten.div: _scaled,
    aten.add: _shifted,
    aten.sub: _shifted,
    aten.neg: _negated,
}
