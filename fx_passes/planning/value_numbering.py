"""Entries of a token's row that are equal for every token: heads that a checkpoint holds twice.

A model whose grouped heads were repeated in its weights computes the same keys several times. Entries get the same
class when they are the same op of the same classes and of equal constants, down to products with equal rows of weights,
compared bit by bit (by their SHA-256). What no rule knows is equal to nothing but itself, so two entries of one class
are equal whatever the tokens are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, is_call, read_attribute, tensor_value
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.planning.linear_forms import FormReader, NotLinear, is_linear
from kvpass.fx_passes.planning.minimum_cut import BATCH, LENGTH, entries_per_token, has_tokens, is_move
from kvpass.fx_passes.shape_values import CannotEvaluate, Dependence, ShapeEvaluator, is_random
from kvpass.fx_passes.token_axis.contraction import contraction_of
from kvpass.fx_passes.token_axis.infer_axes import Inference

DEEPEST = 48  # ops between the projection of a head and what is stored of it
REDUCTIONS = (aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.linalg_vector_norm)


class EntryClasses:
    """Numbers that are the same for entries which are proven to be equal.

    Args:
        inference: axes of the graph's nodes.
        evaluator: gives the values of constants.
    """

    def __init__(self, inference: Inference, evaluator: ShapeEvaluator) -> None:
        self.reader = FormReader(inference, evaluator, ())
        self.inference = inference
        self.evaluator = evaluator
        self.known: dict[Node, Tensor] = {}
        self.numbers: dict[Any, int] = {}
        self.values = _value_numbers(inference)

    def of_row(self, nodes: Sequence[Node]) -> Tensor:
        """Class of every entry of a row, int64 ``[entries]``, one node after the other."""
        return torch.cat([self.of(node) for node in nodes])

    def of(self, node: Node, depth: int = 0) -> Tensor:
        """Class of every entry of a token, int64 ``[entries]``, by its place."""
        if node not in self.known:
            found: Tensor | None = None
            if depth < DEEPEST and has_tokens(self.inference, node) and not is_random(node):
                try:
                    found = self._read(node, depth + 1)
                except (NotLinear, CannotEvaluate):
                    found = None
            places = range(entries_per_token(self.inference, node))
            self.known[node] = (
                self._numbered([(self.values[node], place) for place in places]) if found is None else found
            )
        return self.known[node]

    def _numbered(self, keys: Sequence[Any]) -> Tensor:
        return torch.tensor([self.numbers.setdefault(key, len(self.numbers)) for key in keys])

    def _read(self, node: Node, depth: int) -> Tensor | None:
        if is_move(node):
            bases, origin = self.reader.trace(node)
            return torch.cat([self.of(base, depth) for base in bases])[origin]
        if contraction_of(node) is not None:
            return self._product(node)
        if is_call(node, *REDUCTIONS):
            return self._reduction(node, depth)
        facts = facts_of(node.target)
        if facts is not None and facts.kind is OpKind.POINTWISE:
            return self._pointwise(node, depth)
        return None

    def _product(self, node: Node) -> Tensor | None:
        """Products of one row with equal columns of weights are equal; the row is not looked into."""
        contraction = contraction_of(node)
        if contraction is None or not is_linear(self.inference, node):
            return None
        product = self.reader.product(node, contraction)
        matrix = self._value(product.weights).movedim(product.summed, -1).flatten(0, -2)
        columns, rows = _digests(matrix), _digests(product.rows)
        kind = (node.meta["val"].dtype, matrix.dtype, self.values[product.source], contraction.alpha, contraction.beta)
        added: list[Any] = [None] * len(product.row_of)
        if contraction.added is not None:
            added = self._operand(contraction.added, node, 0)
        pairs = zip(product.row_of.tolist(), product.column_of.tolist(), added, strict=True)
        return self._numbered([(kind, rows[row], columns[column], more) for row, column, more in pairs])

    def _pointwise(self, node: Node, depth: int) -> Tensor:
        """The same op of equal operands."""
        named = arguments(node)
        operands = [self._operand(value, node, depth) for value in named.values() if isinstance(value, Node)]
        if len({value for value in named.values() if isinstance(value, Node)}) != len(node.all_input_nodes):
            raise NotLinear("an op of a list of tensors")
        rest = repr([(name, value) for name, value in named.items() if not isinstance(value, Node)])
        kind = (str(node.target), rest, node.meta["val"].dtype)
        return self._numbered([(kind, *entries) for entries in zip(*operands, strict=True)])

    def _reduction(self, node: Node, depth: int) -> Tensor | None:
        """The same op over equal entries in the same order."""
        named = dict(arguments(node))
        source, dims = named.pop("self"), named.pop("dim")
        if dims is None or any(isinstance(value, Node) for value in named.values()):
            return None
        numbers = self.reader.numbers_of(source)
        chosen = [d % numbers.dim() for d in ([dims] if isinstance(dims, int) else dims)]
        if not chosen:
            return None
        kept = [d for d in range(numbers.dim()) if d not in chosen]
        vectors = numbers.permute(*kept, *chosen).flatten(len(kept)).reshape(-1, _size(numbers, chosen))
        where = self.reader.where(node, torch.arange(entries_per_token(self.inference, node)))
        mine = vectors[where]
        classes = self.of(source, depth)
        if (mine >= len(classes)).any():
            return None
        kind = (str(node.target), repr(named), node.meta["val"].dtype)
        return self._numbered([(kind, digest) for digest in _digests(classes[mine])])

    def _operand(self, value: Node, node: Node, depth: int) -> list[Any]:
        """What a broadcast operand gives for each entry of the first token: a class, a number, or a place in it."""
        shape = self.reader.shape(node)
        where = self.reader.where(node, torch.arange(entries_per_token(self.inference, node)))
        if self.inference.is_data(value):
            numbers = self.reader.numbers_of(value).expand(shape).flatten()[where]
            classes = self.of(value, depth)
            if (numbers >= len(classes)).any():
                raise NotLinear("an operand of other tokens")
            return [("class", number) for number in classes[numbers].tolist()]
        if tensor_value(value) is None:
            return [("number", self.values[value])] * len(where)
        sizes = self.reader.shape(value)
        index = torch.arange(torch.Size(sizes).numel()).view(sizes).expand(shape).flatten()[where]
        if self.inference.kinds[value] is Dependence.CONSTANT:
            entries = self._value(value).flatten()[index]
            return [(entries.dtype, digest) for digest in _digests(entries.unsqueeze(1))]
        return [
            (self.values[value], place) for place in index.tolist()
        ]  # one and the same entry of what depends on positions

    def _value(self, node: Node) -> Tensor:
        return self.evaluator.evaluate(node, BATCH, LENGTH)


def _value_numbers(inference: Inference) -> dict[Node, int]:
    """The same number for nodes that are the same op of the same inputs."""
    numbers: dict[Node, int] = {}
    seen: dict[Any, int] = {}
    for node in inference.captured.graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            key: Any = ("size", expression(node))
        elif node.op == "get_attr":
            key = ("tensor", id(read_attribute(inference.captured.module, str(node.target))))
        elif node.op == "call_function" and not is_random(node):
            key = repr(torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{numbers[n]}"))
            key = (str(node.target), key)
        else:
            key = node
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


def _size(tensor: Tensor, dims: Sequence[int]) -> int:
    return math.prod(tensor.shape[d] for d in dims)


def _digests(matrix: Tensor) -> list[bytes]:
    """The bytes of each row of ``[R, n]``, or what stands for them where they are many (SHA-256)."""
    rows = matrix.detach().cpu().contiguous().view(torch.uint8).numpy()
    if rows.shape[1] <= 32:
        return [row.tobytes() for row in rows]
    return [hashlib.sha256(row).digest() for row in rows]
