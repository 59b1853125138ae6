"""``prove-token-axis``: outside of its attentions the graph treats every token by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from kvpass.fx_passes.axes import Axes, Kind, Mixed, kinds_in
from kvpass.fx_passes.axis_rules import RULES
from kvpass.fx_passes.find_positions import position_sources
from kvpass.fx_passes.graph import CapturedGraph, PassResult, refuse
from kvpass.fx_passes.infer_axes import Inference, infer_axes
from kvpass.fx_passes.shape_values import ShapeEvaluator, classify
from kvpass.types import Refusal


@dataclass(frozen=True)
class ProveTokenAxis:
    """Prove that the logits of a token depend on that token, its position, and what attention brings it.

    Before: a graph in which attention is ``kvpass::dense_attention``.
    After: the same graph.
    Requires: ``find-attention``.
    Refuses: every op that mixes tokens or sequences, or that has no rule, if the logits depend on it.
    """

    name: str = "prove-token-axis"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Check the graph; nothing is rewritten."""
        inference = token_axes(captured)
        result = inference.results[captured.output]
        if not isinstance(result, Mixed):
            axes = result
            assert isinstance(axes, tuple)
            if len(axes) == 3 and [kinds_in(d) for d in axes[:2]] == [{Kind.BATCH}, {Kind.TOKEN}]:
                return PassResult()
            reason = "the logits are not [batch, length, vocabulary] of one token each"
            return PassResult(0, (refuse(captured, captured.output, reason, self.name),))
        return PassResult(0, tuple(self._refusals(captured, inference)))

    def _refusals(self, captured: CapturedGraph, inference: Inference) -> list[Refusal]:
        found: list[Refusal] = []
        for node in _live_through_mixed(captured, inference):
            mixed = inference.results[node]
            assert isinstance(mixed, Mixed)
            op = str(node.target) if node.op == "call_function" else node.op
            found.append(refuse(captured, node, f"{op} {mixed.reason}", self.name))
        return found


def token_axes(captured: CapturedGraph) -> Inference:
    """The axes of every node, products of tokens with tokens refused."""
    kinds = classify(captured)
    evaluator = ShapeEvaluator(captured, kinds)
    inference = Inference(captured, kinds, position_sources(captured, kinds, evaluator))
    infer_axes(inference, RULES)
    return inference


def _live_through_mixed(captured: CapturedGraph, inference: Inference) -> list[Node]:
    """The nodes at which mixing starts, of those that the logits depend on."""
    seen: set[Node] = set()
    stack = [captured.output]
    origins: list[Node] = []
    while stack:
        node = stack.pop()
        result = inference.results.get(node)
        if node in seen or not isinstance(result, Mixed):
            continue
        seen.add(node)
        if result.node is node:
            origins.append(node)
        stack.extend(node.all_input_nodes)
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    return sorted(origins, key=order.__getitem__)


def token_axes_of(inference: Inference, node: Node) -> Axes:
    """Axes of a node that was proven to be token-wise."""
    axes = inference.results[node]
    assert isinstance(axes, tuple)
    return axes
