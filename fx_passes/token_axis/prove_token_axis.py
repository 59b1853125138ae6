"""``prove-token-axis``: outside of its attentions the graph treats every token by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, refuse
from kvpass.fx_passes.shape_values import ShapeEvaluator, classify
from kvpass.fx_passes.token_axis.axes import Axes, Kind, Mixed, kinds_in
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.find_positions import position_sources
from kvpass.fx_passes.token_axis.infer_axes import Inference, infer_axes


@dataclass(frozen=True)
class ProveTokenAxis:
    """Prove that the logits of a token depend on that token, its position, and what attention brings it.

    Before: a graph in which attention is ``kvpass::dense_attention``.
    After: the same graph.
    Requires: ``find-attention``.
    Refuses: the first op that mixes tokens or sequences, or that has no rule, of those that the logits depend on.
    """

    name: str = "prove-token-axis"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Check the graph; nothing is rewritten."""
        inference = token_axes(captured)
        axes = inference.results[captured.output]
        if isinstance(axes, tuple):
            if len(axes) == 3 and [kinds_in(d) for d in axes[:2]] == [{Kind.BATCH}, {Kind.TOKEN}]:
                return PassResult()
            reason = "the logits are not [batch, length, vocabulary] of one token each"
            return PassResult(0, (refuse(captured, captured.output, reason, self.name),))
        assert isinstance(axes, Mixed)
        op = str(axes.node.target) if axes.node.op == "call_function" else axes.node.op
        return PassResult(0, (refuse(captured, axes.node, f"{op} {axes.reason}", self.name),))


def token_axes(captured: CapturedGraph) -> Inference:
    """The axes of every node, products of tokens with tokens refused."""
    kinds = classify(captured)
    evaluator = ShapeEvaluator(captured, kinds)
    inference = Inference(captured, kinds, position_sources(captured, kinds, evaluator))
    infer_axes(inference, AXIS_RULES)
    return inference


def token_axes_of(inference: Inference, node: Node) -> Axes:
    """Axes of a node that was proven to be token-wise."""
    axes = inference.results[node]
    assert isinstance(axes, tuple)
    return axes
