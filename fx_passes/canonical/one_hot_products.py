"""``one-hot-products``: heads that are repeated by arithmetic are repeated by an index."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, aten, emit, hold, is_call, reads_parameter, shape_of
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator, classify, shape_evaluator
from kvpass.fx_passes.token_axis.contraction import Contraction, contraction_of

LARGEST = 1 << 20  # entries of a constant that is looked at
SAMPLE = 64


@dataclass(frozen=True)
class OneHotProducts:
    """Write products with constants that only pick and repeat entries as the moves that they are.

    Before: a matrix product with a constant of zeros and a single one per column, such as heads repeated by ``einsum``
        with a matrix of groups; a product with a constant of ones.
    After: ``index_select`` and ``expand``. (Where an entry is infinite or NaN, zero times it is no longer added.)
    Requires: ``canonicalize``.
    Refuses: nothing. Parameters are no constants here: a later change of the model's weights counts.
    """

    name: str = "one-hot-products"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite every such product."""
        kinds, evaluator = captured.analysis(classify), captured.analysis(shape_evaluator)
        rewritten = 0
        for node in list(captured.graph.nodes):
            constants = [n for n in node.all_input_nodes if kinds.get(n) is Dependence.CONSTANT]
            if kinds[node] is not Dependence.DATA or len(constants) != 1 or not _is_small(constants[0]):
                continue
            if reads_parameter(
                captured, constants[0]
            ):  # it is ones or zeros by chance, before its values are learned or loaded
                continue
            with captured.graph.inserting_before(node):
                replacement = _selection(captured, evaluator, node, constants[0])
            if replacement is not None and replacement.meta["val"].dtype == node.meta["val"].dtype:
                evaluator.record(constants[0], "a product that only picks entries")
                node.replace_all_uses_with(replacement)
                captured.graph.erase_node(node)
                rewritten += 1
        captured.tidy()
        return PassResult(rewritten)


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() <= LARGEST


def _selection(captured: CapturedGraph, evaluator: ShapeEvaluator, node: Node, constant: Node) -> Node | None:
    contraction = contraction_of(node)
    if contraction is None and not is_call(node, aten.mul):
        return None
    with evaluator.deciding(None):
        value = evaluator.evaluate(constant, 1, 2)
    if not _is_zeros_and_ones(value.flatten()[:SAMPLE]) or not _is_zeros_and_ones(value):
        return None
    if contraction is not None:
        return _picked(captured, contraction, constant, value)
    source = next(n for n in node.all_input_nodes if n is not constant)
    if source.meta["val"].dtype != node.meta["val"].dtype or not bool((value == 1).all()):
        return None
    if shape_of(source) == shape_of(node):
        return source
    rank = len(shape_of(node))
    fixed = [int(s) if s.is_number else -1 for s in shape_of(node)]
    lined_up = [None] * (rank - len(shape_of(source))) + list(shape_of(source))
    if any(size == -1 and own is None for size, own in zip(fixed, lined_up, strict=True)):
        return None
    return emit(captured, aten.expand.default, source, fixed, like=node)


def _is_zeros_and_ones(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def _picked(captured: CapturedGraph, contraction: Contraction, constant: Node, value: Tensor) -> Node | None:
    """The rows or columns that a product picks whose sums have one 1 each."""
    node, on_the_right = contraction.node, contraction.right is constant
    source = contraction.left if on_the_right else contraction.right
    rank = len(shape_of(node))
    if contraction.added is not None or contraction.alpha != 1 or contraction.vector or value.dim() < 2:
        return None
    if value.numel() != value.shape[-1] * value.shape[-2] or len(shape_of(source)) != rank:
        return None
    if contraction.right_is_transposed and not on_the_right:
        return None
    matrix = value.reshape(value.shape[-2:])  # brought to [sums, what is summed]
    if on_the_right and not contraction.right_is_transposed:
        matrix = matrix.T
    if not bool((matrix.sum(1) == 1).all()):
        return None
    name, index = f"_picked_{node.name}", matrix.argmax(1)
    places = hold(captured, name, index)
    return emit(captured, aten.index_select.default, source, rank - 1 if on_the_right else rank - 2, places, like=node)
