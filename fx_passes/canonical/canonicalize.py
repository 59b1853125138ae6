"""``canonicalize``: one spelling per op, and nothing in the graph that computes nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.fx_passes.canonical.expand_flex import expand_flex_attention
from kvpass.fx_passes.canonical.head_moves import pick_group, pick_heads, pick_one_head, split_heads
from kvpass.fx_passes.canonical.softmax_rules import (
    by_division,
    by_exponential,
    by_reciprocal,
    divided_after_values,
    in_base_two,
    log_of_sum,
    product_by_sum,
    shifted_log_of_sum,
)
from kvpass.fx_passes.graph import (
    FULL,
    CapturedGraph,
    PassResult,
    arguments,
    aten,
    emit,
    expression,
    is_call,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import facts_of


@dataclass(frozen=True)
class Canonicalize:
    """Rewrite spellings that mean the same to one of them.

    Before: an ATen graph as torch.export gives it.
    After: no assertions, copies, aliases, no-op casts, slices or reshapes; ``view`` is ``reshape``; a softmax written
        with ``exp`` and a sum is ``softmax``.
    Requires: nothing.
    Refuses: nothing; what is not recognised stays as it is.
    """

    name: str = "canonicalize"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite to a fixed point."""
        rewritten = _drop_assertions(captured) + expand_flex_attention(captured)
        changed = True
        while changed:
            changed = False
            for node in list(captured.graph.nodes):
                rule = _rule_for(node)
                if rule is None or not node.users:
                    continue
                with captured.graph.inserting_before(node):
                    replacement = rule(captured, node)
                if replacement is not None and replacement is not node and _same_tensor(replacement, node):
                    node.replace_all_uses_with(replacement)
                    captured.graph.erase_node(node)
                    rewritten, changed = rewritten + 1, True
            captured.graph.eliminate_dead_code()
        captured.tidy()
        return PassResult(rewritten)


def _drop_assertions(captured: CapturedGraph) -> int:
    dropped = 0
    for node in reversed(list(captured.graph.nodes)):
        facts = facts_of(node.target)
        dead = facts is not None and facts.kind is OpKind.ASSERTION
        if (dead or (node.op == "call_module" and "guards" in str(node.target))) and not node.users:
            captured.graph.erase_node(node)
            dropped += 1
    return dropped


Rule = Callable[[CapturedGraph, Node], Node | None]


def _rule_for(node: Node) -> Rule | None:
    if node.op != "call_function":
        return None
    return RULES.get(getattr(node.target, "overloadpacket", node.target))


def _same_tensor(a: Node, b: Node) -> bool:
    """Whether two nodes agree in shape, dtype and device."""
    x, y = tensor_value(a), tensor_value(b)
    return (
        x is not None and y is not None and x.dtype == y.dtype and x.device == y.device and shape_of(a) == shape_of(b)
    )


def _source(captured: CapturedGraph, node: Node) -> Node | None:
    """The op hands its input on."""
    source = node.args[0]
    return source if isinstance(source, Node) else None


def _if_unchanged(captured: CapturedGraph, node: Node) -> Node | None:
    """The op is dropped where shape, dtype and device stay the same (casts, expands)."""
    source = _source(captured, node)
    return source if source is not None and _same_tensor(node, source) else None


def _dropout(captured: CapturedGraph, node: Node) -> Node | None:
    named = arguments(node)
    off = named.get("train") is False or named.get("p") == 0
    return named["input"] if off and not is_call(node, aten.native_dropout) else None


def _view(captured: CapturedGraph, node: Node) -> Node | None:
    """``view`` pins strides; ``reshape`` does not. A reshape to the same shape is dropped."""
    source = _source(captured, node)
    if source is None or isinstance(node.args[1], torch.dtype):
        return None
    if _same_tensor(node, source):
        return source
    if is_call(node, aten.reshape):
        return _reshape_of_reshape(captured, node, source) or split_heads(captured, node)
    return emit(captured, aten.reshape.default, source, node.args[1], like=node)


def _reshape_of_reshape(captured: CapturedGraph, node: Node, source: Node) -> Node | None:
    if not is_call(source, aten.reshape):
        return None
    return emit(captured, aten.reshape.default, source.args[0], node.args[1], like=node)


def _slice(captured: CapturedGraph, node: Node) -> Node | None:
    named = arguments(node)
    whole = (named["start"] in (0, None)) and named["end"] in (FULL, None) and named["step"] == 1
    return named["self"] if whole or _same_tensor(node, named["self"]) else pick_heads(captured, node)


def _slice_scatter(captured: CapturedGraph, node: Node) -> Node | None:
    """Writing over the whole of a tensor gives what was written."""
    named = arguments(node)
    whole = (named["start"] in (0, None)) and named["end"] in (FULL, None) and named["step"] == 1
    return named["src"] if whole and _same_tensor(node, named["src"]) else None


def _copy(captured: CapturedGraph, node: Node) -> Node | None:
    """``copy(a, b)`` is ``b`` in a's shape and dtype."""
    target, source = node.args[0], node.args[1]
    assert isinstance(target, Node) and isinstance(source, Node)
    value = tensor_value(target)
    if value is None or shape_of(target) != shape_of(source):
        return None
    if value.dtype == source.meta["val"].dtype:
        return source
    return emit(captured, aten._to_copy.default, source, like=node, dtype=value.dtype)


def _type_as(captured: CapturedGraph, node: Node) -> Node | None:
    source = node.args[0]
    assert isinstance(source, Node)
    if _same_tensor(node, source):
        return source
    return emit(captured, aten._to_copy.default, source, like=node, dtype=node.meta["val"].dtype)


def _identity_with(number: float) -> Rule:
    """Adding 0 and multiplying by 1 are dropped where they change no dtype."""

    def rule(captured: CapturedGraph, node: Node) -> Node | None:
        named = arguments(node)
        source, other = named["self"], named["other"]
        if (
            isinstance(other, bool)
            or not isinstance(other, (int, float))
            or other != number
            or named.get("alpha", 1) != 1
        ):
            return None
        return source if isinstance(source, Node) and _same_tensor(node, source) else None

    return rule


def _add(captured: CapturedGraph, node: Node) -> Node | None:
    return _identity_with(0)(captured, node) or shifted_log_of_sum(captured, node)


def _div(captured: CapturedGraph, node: Node) -> Node | None:
    if arguments(node).get("rounding_mode") is not None:
        return None
    return _identity_with(1)(captured, node) or by_division(captured, node) or divided_after_values(captured, node)


def _mul(captured: CapturedGraph, node: Node) -> Node | None:
    return _identity_with(1)(captured, node) or by_reciprocal(captured, node)


def _transposed_twice(captured: CapturedGraph, node: Node) -> Node | None:
    """Two swaps of the same dims cancel; a swap of dims is written with dims counted from 0, smaller first."""
    source, a, b = node.args
    assert isinstance(source, Node) and isinstance(a, int) and isinstance(b, int)
    rank = len(shape_of(node))
    a, b = sorted((a % rank, b % rank))
    if is_call(source, aten.transpose) and source.args[1:] == (a, b):
        inner = source.args[0]
        return inner if isinstance(inner, Node) else None
    if a == b:
        return source
    return emit(captured, aten.transpose.int, source, a, b, like=node) if node.args[1:] != (a, b) else None


def _t(captured: CapturedGraph, node: Node) -> Node | None:
    rank = len(shape_of(node))
    return emit(captured, aten.transpose.int, node.args[0], 0, 1, like=node) if rank == 2 else _source(captured, node)


def _squeeze(captured: CapturedGraph, node: Node) -> Node | None:
    """``squeeze`` of a dim that is not 1 does nothing; without a dim it drops those that are 1."""
    return _if_unchanged(captured, node)


def _cat(captured: CapturedGraph, node: Node) -> Node | None:
    """A tensor joined with empty ones, as a cache does that holds nothing yet, is that tensor."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    filled = [n for n in parts if isinstance(n, Node) and 0 not in shape_of(n)]
    return filled[0] if len(filled) == 1 and _same_tensor(node, filled[0]) else None


def _repeat_once(captured: CapturedGraph, node: Node) -> Node | None:
    source = _source(captured, node)
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    if source is not None and all(expression(s) == 1 for s in sizes) and _same_tensor(node, source):
        return source
    return None


def _index_put(captured: CapturedGraph, node: Node) -> Node | None:
    """``x[:, mask] = number`` is ``masked_fill``: how many entries the mask has does not matter to it."""
    named = arguments(node)
    source, value, indices = named["self"], named["values"], list(named["indices"])
    masks = [i for i, n in enumerate(indices) if isinstance(n, Node)]
    if len(masks) != 1 or masks[0] != len(indices) - 1 or named["accumulate"] or shape_of(value) != ():
        return None
    mask, before = indices[-1], len(indices) - 1
    covered = before + len(shape_of(mask))
    if mask.meta["val"].dtype != torch.bool or shape_of(mask) != shape_of(source)[before:covered]:
        return None
    for _ in range(len(shape_of(source)) - covered):
        mask = emit(captured, aten.unsqueeze.default, mask, -1, like=node)
    return emit(captured, aten.masked_fill.Tensor, source, mask, value, like=node)


def _view_as_complex(captured: CapturedGraph, node: Node) -> Node | None:
    """A view as complex numbers demands adjacent pairs, and the copies that made them so are gone: pairs are joined."""
    pairs = node.args[0]
    if is_call(pairs, aten.stack):
        return None
    halves = [emit(captured, aten.select.int, pairs, -1, i, like=node) for i in (0, 1)]
    joined = emit(captured, aten.stack.default, halves, -1, like=node)
    return emit(captured, aten.view_as_complex.default, joined, like=node)


RULES: dict[object, Rule] = {
    aten.clone: _source,
    aten.contiguous: _source,
    aten.alias: _source,
    aten.detach: _source,
    aten.detach_: _source,
    aten.lift_fresh: _source,
    aten.lift_fresh_copy: _source,
    aten.dropout: _dropout,
    aten.feature_dropout: _dropout,
    aten._to_copy: _if_unchanged,
    aten.to: _if_unchanged,
    aten.expand: _if_unchanged,
    aten.squeeze: _squeeze,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.reshape: _view,
    aten.slice: _slice,
    aten.select: pick_one_head,
    operator.getitem: pick_group,
    aten.index_put: _index_put,
    aten.slice_scatter: _slice_scatter,
    aten.copy: _copy,
    aten.type_as: _type_as,
    aten.add: _add,
    aten.sub: _identity_with(0),
    aten.mul: _mul,
    aten.div: _div,
    aten.exp: by_exponential,
    aten.exp2: in_base_two,
    aten.log: log_of_sum,
    aten.sum: product_by_sum,
    aten.transpose: _transposed_twice,
    aten.t: _t,
    aten.repeat: _repeat_once,
    aten.view_as_complex: _view_as_complex,
    aten.cat: _cat,
}
