"""The graph of one step while it is lowered: what the passes of the stage work on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph
from kvpass.fx_passes.planning.plan_cache import GraphPlan
from kvpass.types import CachePlan, FoldedRotation


@dataclass(frozen=True, eq=False)
class RowRotation:
    """A product of rows with a block diagonal matrix, as ``store-in-formats`` puts it around a cache.

    Attributes:
        cache: name of the cache's tensor in the graph, such as ``value_cache_0``.
        role: what the rows are: "key", "value", "query" or "output".
        rows: node of the rows ``[T, H, W]``.
        nodes: the nodes that compute the rotated rows ``[T, H, W]`` of them, the last of which is these.
        matrix_node: node of the matrix.
        matrix: one block ``[b, b]``; b divides W.
    """

    cache: str
    role: str
    rows: Node
    nodes: tuple[Node, ...]
    matrix_node: Node
    matrix: Tensor

    @property
    def result(self) -> Node:
        """The rotated rows."""
        return self.nodes[-1]

    def apply(self, rows: Tensor) -> Tensor:
        """Rotate rows ``[..., W]``, in their dtype."""
        block = len(self.matrix)
        turned: Tensor = rows.unflatten(-1, (-1, block)) @ self.matrix.to(rows.dtype)
        return turned.flatten(-2)


@dataclass(eq=False)
class StepGraph:
    """A planned graph on its way to the graph of one step.

    Attributes:
        captured: the graph; it is rewritten in place.
        plan: what the rewrite is to do.
        cache_plan: the caches as the graph has them by now.
        step: the inputs of a step, by name.
        results: the result ``[1, Hq, T, Dv]`` of each attention, in the order of the plan's sites.
        rotations: products around the caches that are still in the graph.
        folded: what became of rotations.
        derived_bytes: of the weights that rotations are part of, beside the model's own.
    """

    captured: CapturedGraph
    plan: GraphPlan
    cache_plan: CachePlan
    step: dict[str, Node] = field(default_factory=dict)
    results: list[Node] = field(default_factory=list)
    rotations: list[RowRotation] = field(default_factory=list)
    folded: tuple[FoldedRotation, ...] = ()
    derived_bytes: int = 0

    @property
    def end(self) -> Node:
        """The graph's output node."""
        end: Node = next(node for node in reversed(self.captured.graph.nodes) if node.op == "output")
        return end
