"""Values that are the same whatever the batch size and the length are, and for every token."""

from __future__ import annotations

from torch.fx import Node

from kvpass.fx_passes.graph import shape_of
from kvpass.fx_passes.shape_values import CannotEvaluate, ShapeEvaluator
from kvpass.fx_passes.symbolic.extent_moves import ActsError
from kvpass.fx_passes.symbolic.extents import Extents


def is_fixed(evaluator: ShapeEvaluator, node: Node) -> bool:
    """Whether a shape-only tensor is made of constants that are spread over sequences and tokens.

    The batch size and the length may say how large it is, and along dims of such a size all entries are equal. So one
    look at its values tells all there is to know.
    """
    try:
        varies = Extents(evaluator).varies(node)
    except (ActsError, CannotEvaluate):
        return False
    return all(shape_of(node)[dim].is_number for dim in varies)
