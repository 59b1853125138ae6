"""The moves of a paged step, run for a few tokens: where entries come from and where they go, or what they become."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.evaluate import NUMBERED, evaluate_node
from kvpass.fx_passes.graph import (
    CapturedGraph,
    describe,
    expression,
    is_call,
    read_attribute,
    record_values,
    tensor_value,
)
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.planning.minimum_cut import MOVES

aten = torch.ops.aten
TOKENS = 3


class NotMoved(Exception):
    """Why entries cannot be followed."""


def is_step_move(node: Node) -> bool:
    """Whether a node only moves entries of its inputs, or casts them between floats."""
    if is_call(node, aten._to_copy):
        return all(n.meta["val"].dtype.is_floating_point for n in (*node.all_input_nodes, node))
    return is_call(node, *MOVES) or is_item_of(node.target)


class StepMoves:
    """Runs moves of the graph of a paged step as if it had :data:`TOKENS` tokens.

    What is not given is -1 among numbers, and random, always the same, among floats.

    Args:
        captured: the graph; its token ids are ``[1, T]``.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self.generator = torch.Generator().manual_seed(0)
        self._random: dict[Node, Tensor] = {}

    def shape(self, node: Node) -> list[int]:
        """The node's shape for so many tokens."""
        return [self._size(size) for size in node.meta["val"].shape]

    def tokens_of(self, node: Node) -> Tensor:
        """The token of each row of a node ``[..., W]`` that holds one row for each, int64 ``[T]``.

        Raises:
            NotMoved: if it holds more rows, or fewer.
        """
        if math.prod(self.shape(node)[:-1]) != TOKENS:
            raise NotMoved(f"{describe(node)} has not one row for each token")
        return torch.arange(TOKENS)

    def before(self, target: Node) -> tuple[list[Node], list[Node]]:
        """The moves that lead to a node, in order, and the nodes that they begin with."""
        path: set[Node] = set()
        sources: set[Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node in path or node in sources:
                continue
            if is_step_move(node):
                path.add(node)
                stack.extend(n for n in node.all_input_nodes if self._is_data(n))
            else:
                sources.add(node)
        return sorted(path), sorted(sources)

    def after(self, start: Node, numbers: Mapping[Node, Any]) -> Iterator[Node]:
        """The users of a node, and of all that are put in ``numbers``, in the graph's order."""
        waiting = list(start.users)
        heapq.heapify(waiting)
        seen = set(waiting)
        while waiting:
            node = heapq.heappop(waiting)
            yield node
            for user in node.users if node in numbers else ():
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(waiting, user)

    def run(self, path: Sequence[Node], given: Mapping[Node, Any]) -> dict[Node, Any]:
        """What moves in order make of tensors that are given.

        Raises:
            NotMoved: if one is picked by data.
        """
        values = dict(given)
        for node in path:
            values[node] = self.evaluate(node, values)
        return values

    def evaluate(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """What one node makes of its inputs, of which those in ``values`` are given.

        Raises:
            NotMoved: if it picks by data.
        """
        floats = any(isinstance(v, Tensor) and v.is_floating_point() for v in values.values())
        if is_call(node, aten._to_copy):
            return values[node.all_input_nodes[0]]
        try:
            return evaluate_node(node, values, replace(NUMBERED, other=lambda n: self._other(n, floats)))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what numbers cannot show is not proven
            raise NotMoved(f"{describe(node)} cannot be followed: {error}") from error

    def _other(self, node: Node, floats: bool) -> Any:
        value = tensor_value(node)
        if value is None:
            return self._size(node)
        if value.is_floating_point():
            if not floats:
                return torch.full(self.shape(node), -1)
            if node not in self._random:
                self._random[node] = torch.randn(self.shape(node), dtype=torch.float64, generator=self.generator)
            return self._random[node]
        if node.op == "get_attr":
            record_values(self.captured, (node,), "the order of stored entries")
            return read_attribute(self.captured.module, str(node.target)).cpu()
        if node.op == "placeholder" and node.name == "logits_index":
            return torch.arange(int(value.shape[0])) % TOKENS
        raise NotMoved(f"{describe(node)} picks entries by what is computed")

    def _is_data(self, node: Node) -> bool:
        value = node.meta.get("val")
        tensors = value if isinstance(value, list | tuple) else [value]
        return any(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors)

    def _size(self, value: Any) -> int:
        size = expression(value).subs({self.captured.batch: 1, self.captured.length: TOKENS})
        if not size.is_number:
            raise NotMoved("it has a size that follows from more than the tokens")
        return int(size)
