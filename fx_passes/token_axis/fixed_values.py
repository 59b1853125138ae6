"""Values that are the same whatever the batch size and the length are, and for every token."""

from __future__ import annotations

from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, is_call, tensor_value
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator
from kvpass.fx_passes.token_axis.infer_axes import computes_with_sizes


def is_fixed(evaluator: ShapeEvaluator, node: Node) -> bool:
    """Whether a shape-only tensor consists of constants that are computed with each other and spread over its shape.

    The batch size and the length may say how large it is, and take no other part: no position is counted, no table is
    cut to the length, nothing is summed over the tokens. So one look at its values tells all there is to know.
    """
    return all(_is_fixed(evaluator, each) for each in evaluator.needed(node))


def _is_fixed(evaluator: ShapeEvaluator, node: Node) -> bool:
    if evaluator.kinds[node] is Dependence.CONSTANT or tensor_value(node) is None:
        return True  # a number of the input's shape is followed to where it is used
    if is_call(node, aten.repeat):  # over sequences: over tokens, a pattern might be laid
        return all(evaluator.captured.length not in expression(count).free_symbols for count in node.args[1])  # type: ignore[union-attr]
    if node.op != "call_function" or computes_with_sizes(arguments(node)):
        return False
    facts = facts_of(node.target)
    return facts is not None and (facts.kind is OpKind.POINTWISE or facts.fresh or facts.spreads)
