"""Bring a tensor of any layout to the canonical one, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, aten, emit, expression, shape_of
from kvpass.fx_passes.token_axis.axes import Axes, Factor

Group = Sequence[Factor]


def size_node(captured: CapturedGraph, size: sympy.Expr | int) -> Node | int:
    """A size as a graph argument: a number, or a node that multiplies batch size and length."""
    size = expression(size)
    if size.is_number:
        return int(size)
    coefficient, symbols = size.as_coeff_Mul()
    parts: list[Node] = []
    for base, power in symbols.as_powers_dict().items():
        which = {captured.batch: "batch", captured.length: "length"}[base]
        parts += [captured.size(which)] * int(power)
    result: Node | int = int(coefficient)
    for part in parts:
        result = part if result == 1 else emit(captured, operator.mul, result, part)
    return result


def arrange(captured: CapturedGraph, node: Node, axes: Axes, groups: Sequence[Group], like: Node) -> Node:
    """Reorder factors so that dim i of the result is the product of ``groups[i]``.

    A factor that the tensor does not have is broadcast where others of its group are there; a group without any is a
    dim of size 1.
    """
    atoms = [factor for dim in axes for factor in dim]
    missing = [factor for group in groups for factor in group if factor not in atoms]
    current = _reshape(captured, node, [f.size for f in atoms] + [1] * len(missing), like)
    have = atoms + missing
    order = [have.index(factor) for group in groups for factor in group]
    if order != list(range(len(order))):
        current = emit(captured, aten.permute.default, current, order, like=like)
    partial = [any(f in atoms for f in group) for group in groups]
    wanted = [f.size if f in atoms or whole else 1 for group, whole in zip(groups, partial, strict=True) for f in group]
    if tuple(wanted) != shape_of(current):
        sizes = [size_node(captured, s) for s in wanted]
        current = emit(captured, aten.expand.default, current, sizes, like=like)
    merged = [
        sympy.prod([f.size for f in group]) if whole else sympy.Integer(1)
        for group, whole in zip(groups, partial, strict=True)
    ]
    return _reshape(captured, current, merged, like)


def spread(captured: CapturedGraph, node: Node, groups: Sequence[Group], axes: Axes, like: Node) -> Node:
    """The inverse of :func:`arrange`: from dims that are ``groups`` to dims that are ``axes``."""
    atoms = [factor for group in groups for factor in group]
    current = _reshape(captured, node, [f.size for f in atoms], like)
    order = [atoms.index(factor) for dim in axes for factor in dim]
    if order != list(range(len(order))):
        current = emit(captured, aten.permute.default, current, order, like=like)
    return _reshape(captured, current, [sympy.prod([f.size for f in dim]) for dim in axes], like)


def _reshape(captured: CapturedGraph, node: Node, sizes: Sequence[sympy.Expr | int], like: Node) -> Node:
    if shape_of(node) == tuple(expression(s) for s in sizes):
        return node
    return emit(captured, aten.reshape.default, node, [size_node(captured, s) for s in sizes], like=like)
