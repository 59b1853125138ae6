"""Which rows of logits a forward hands over, and a graph that hands over those of all tokens.

A model made for generation often computes the logits of the last token alone (``head(x[:, [-1]])``), and one made for a
loss may merge batch and length. Both know the logits of every token: they are the last ones of every shorter sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import (
    CapturedGraph,
    LogitsRows,
    arguments,
    aten,
    emit,
    expression,
    is_call,
    is_symbolic_scalar,
    read_attribute,
    record_values,
    shape_of,
)

HANDED_ON = (aten.lift_fresh, aten.lift_fresh_copy, aten.detach, aten.detach_, aten.alias, aten.clone)


def rows_returned(captured: CapturedGraph) -> LogitsRows | None:
    """Which rows the graph returns, by the shape of its output; None if they are none of these."""
    shape, batch, length = shape_of(captured.output), captured.batch, captured.length
    if not shape or not shape[-1].is_number:
        return None
    forms = {
        (batch, length): LogitsRows.EVERY,
        (batch * length,): LogitsRows.MERGED,
        (batch, sympy.Integer(1)): LogitsRows.LAST,
        (batch,): LogitsRows.LAST,
    }
    return forms.get(shape[:-1])


def every_row(model: Callable[..., Tensor], rows: LogitsRows) -> Callable[..., Tensor]:
    """A model that returns ``[B, S, V]``, computed one prefix after the other where the given one returns the last row.

    Args:
        model: called with token ids ``[B, S]``, and position ids of that shape where it takes them.
        rows: what it returns.
    """

    def every(*inputs: Tensor) -> Tensor:
        b, s = inputs[0].shape
        if rows is LogitsRows.LAST:
            return torch.stack([model(*(i[:, : n + 1] for i in inputs)).reshape(b, -1) for n in range(s)], 1)
        return model(*inputs).reshape(b, s, -1)  # merged, or squeezed where there is one sequence

    return every


def return_every_row(captured: CapturedGraph, rows: LogitsRows) -> bool:
    """Rewrite the graph to return logits ``[batch, length, V]``; gives whether it could.

    Before: ``head(x[:, -1:])`` and its like: the last token's row is picked, and all that follows is computed of it, of
        constants, and of the batch size.
    After: ``head(x.reshape(batch * length, 1, ...)).reshape(batch, length, V)``: what follows the pick holds for every
        batch size, so each token may stand in a sequence of its own. That it keeps the rows of a batch apart, the
        proof of the token axis has to show.
    """
    if rows is LogitsRows.EVERY:
        return True
    if rows is LogitsRows.LAST:
        picks = _picks_before(captured)
        if picks is None or not _merge_tokens(captured, picks):
            return False
    output = captured.output
    (result,) = (n for n in captured.graph.nodes if n.op == "output")
    with captured.graph.inserting_before(result):
        shape = [captured.size("batch"), captured.size("length"), int(shape_of(output)[-1])]
        arranged = emit(captured, aten.reshape.default, output, shape, like=output)
    result.replace_input_with(output, arranged)
    captured.tidy()
    return True


def _picks_before(captured: CapturedGraph) -> list[Node] | None:
    """The nodes that pick the last token, if the logits depend on tokens through them alone."""
    picks: list[Node] = []
    stack, seen = [captured.output], {captured.output}
    while stack:
        node = stack.pop()
        if _picks_last(captured, node):
            picks.append(node)
            continue
        if _is_batch(captured, node):
            continue
        if is_symbolic_scalar(node) or captured.length in _symbols(node) or node.op == "placeholder":
            return None
        stack += [used for used in node.all_input_nodes if used not in seen]
        seen.update(node.all_input_nodes)
    return picks


def _symbols(node: Node) -> set[Any]:
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else [values]
    return {x for t in tensors if isinstance(t, Tensor) for s in t.shape for x in expression(s).free_symbols}


def _picks_last(captured: CapturedGraph, node: Node) -> bool:
    """Whether a node is ``x[:, -1]``, ``x[:, -1:]`` or ``x[:, [-1]]`` of an ``x [batch, length, ...]``."""
    if not is_call(node, aten.select, aten.slice, aten.narrow, aten.index):
        return False
    named = arguments(node)
    if shape_of(named["self"])[:2] != (captured.batch, captured.length):
        return False
    if is_call(node, aten.index):
        none, index = (*named["indices"], None)[:2]
        while is_call(index, *HANDED_ON) and isinstance(index, Node):
            index = index.args[0]
        one = none is None and isinstance(index, Node) and index.op == "get_attr" and len(named["indices"]) == 2
        places = read_attribute(captured.module, str(index.target)) if one else torch.zeros(0)
        if places.dtype != torch.int64 or places.dim() > 1 or places.flatten().tolist() != [-1]:
            return False
        record_values(captured, (index,), "which token's logits are returned")
        return True
    place = expression(named["index"] if is_call(node, aten.select) else named["start"] or 0)
    one = is_call(node, aten.select) or (shape_of(node)[1] == 1 and named.get("step", 1) == 1)
    return named["dim"] % len(shape_of(named["self"])) == 1 and one and place in (-1, captured.length - 1)


def _merge_tokens(captured: CapturedGraph, picks: list[Node]) -> bool:
    """Put each token in a sequence of its own at the picks, and give what follows its new shapes."""
    order = [n for n in captured.graph.nodes if n.op == "call_function"]
    after = _after(picks)
    moved: dict[Node, Node] = {}
    for node in picks:
        source = arguments(node)["self"]
        kept = shape_of(node)[1:] if len(shape_of(node)) == len(shape_of(source)) else shape_of(source)[2:]
        if not all(s.is_number for s in kept):
            return False
        with captured.graph.inserting_before(node):
            moved[node] = emit(captured, aten.reshape.default, source, [-1, *(int(s) for s in kept)], like=node)
    first = moved[picks[0]]
    with captured.graph.inserting_after(max(moved.values(), key=list(captured.graph.nodes).index)):
        rows = emit(captured, aten.sym_size.int, first, 0)
    for node in order:
        if node not in after or node in moved:
            continue
        args, kwargs = torch.fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda n: rows if _is_batch(captured, n) else moved.get(n, n)
        )
        with captured.graph.inserting_before(node):
            try:
                moved[node] = emit(captured, node.target, *args, like=node, **kwargs)
            except Exception:  # the op does not hold for other batch sizes, whatever it says
                return False
    output = captured.output
    if output not in moved or shape_of(moved[output])[0] != captured.batch * captured.length:
        return False
    output.replace_all_uses_with(moved[output])
    return True


def _is_batch(captured: CapturedGraph, node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt) and expression(node) == captured.batch


def _after(picks: list[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(picks)
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and user not in found:
                found.add(user)
                stack.append(user)
    return found
