"""``flex_attention`` written out: its score_mod and mask_mod, functions of (batch, head, query, key), as tensors.

torch keeps both as small graphs of scalars. Run on index tensors that broadcast against the scores they give all
scores and the whole mask at once, and what stands there then is an attention like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvpass.fx_passes.attention.layouts import size_node
from kvpass.fx_passes.evaluate import Policy, evaluate_node
from kvpass.fx_passes.graph import CapturedGraph, aten, emit, is_call, shape_of, tensor_value
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.shape_values import Dependence, classify, shape_evaluator

BLOCKS_TRIED = 2  # the block lists of a mask are compared with the mask itself at a little more than so many blocks
LONGEST_TRIED = 2048


def expand_flex_attention(captured: CapturedGraph) -> int:
    """Write out every ``flex_attention`` that can be; the others stay, and are refused by name. Gives their number."""
    found = [n for n in captured.graph.nodes if n.target is torch.ops.higher_order.flex_attention]
    return sum(_expand(captured, node) for node in found)


def _expand(captured: CapturedGraph, node: Node) -> bool:
    results = list(node.users)
    if any(user.args[1] != 0 for user in results):  # the log-sum-exp or the largest score is used as well
        return False
    query, key, value, score_mod, blocks, scale, _, score_buffers, mask_buffers = node.args
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    assert isinstance(score_mod, Node) and isinstance(blocks, (tuple, list)) and isinstance(scale, float)
    assert isinstance(score_buffers, (tuple, list)) and isinstance(mask_buffers, (tuple, list))
    with captured.graph.inserting_before(node):
        dtype = torch.float64 if query.meta["val"].dtype == torch.float64 else torch.float32
        key, value = (_repeated(captured, n, query, node) for n in (key, value))
        left, right = (_cast(captured, n, dtype, node) for n in (query, key))
        turned = emit(captured, aten.transpose.int, right, 2, 3, like=node)
        product = emit(captured, aten.matmul.default, left, turned, like=node)
        scores = emit(captured, aten.mul.Tensor, product, scale, like=node)
        places = _places(captured, product, node)
        modified = _inline(captured, score_mod, [scores, *places, *score_buffers], node)
        mask = _inline(captured, blocks[-1], [*places, *mask_buffers], node)
        if modified is None or mask is None or not _blocks_agree(captured, blocks, mask):
            return False
        hidden = emit(captured, aten.where.ScalarOther, mask, modified, float("-inf"), like=node)
        weights = emit(captured, aten.softmax.int, hidden, -1, like=node)
        weights = _cast(captured, weights, query.meta["val"].dtype, node)
        out = emit(
            captured, aten.matmul.default, weights, _cast(captured, value, weights.meta["val"].dtype, node), like=node
        )
    for user in results:
        user.replace_all_uses_with(out)
        captured.graph.erase_node(user)
    captured.graph.erase_node(node)
    return True


def _repeated(captured: CapturedGraph, node: Node, query: Node, like: Node) -> Node:
    """Keys or values, one for each query head."""
    group = shape_of(query)[1] / shape_of(node)[1]
    return node if group == 1 else emit(captured, aten.repeat_interleave.self_int, node, int(group), 1, like=like)


def _cast(captured: CapturedGraph, node: Node, dtype: torch.dtype, like: Node) -> Node:
    same = node.meta["val"].dtype == dtype
    return node if same else emit(captured, aten._to_copy.default, node, dtype=dtype, like=like)


def _places(captured: CapturedGraph, scores: Node, like: Node) -> list[Node]:
    """Index tensors of batch, head, query and key, each along its own dim of the scores."""
    places: list[Node] = []
    for dim, size in enumerate(shape_of(scores)):
        device = scores.meta["val"].device
        index = emit(captured, aten.arange.default, size_node(captured, size), device=device, like=like)
        shape: list[Any] = [1, 1, 1, 1]
        shape[dim] = size_node(captured, size)
        places.append(emit(captured, aten.reshape.default, index, shape, like=like))
    return places


def _inline(captured: CapturedGraph, function: Any, inputs: Sequence[Any], like: Node) -> Node | None:
    """The result of a graph of scalars on tensors that broadcast, or None where that is not the same."""
    module = getattr(captured.module, str(function.target), None)
    if not isinstance(module, GraphModule):
        return None
    known: dict[Node, Any] = {}
    given = iter(inputs)
    inserted = Policy(call=lambda node, args, kwargs: emit(captured, node.target, *args, like=like, **kwargs))
    for inner in module.graph.nodes:
        if inner.op == "placeholder":
            known[inner] = next(given)
        elif inner.op == "output":
            (result,) = inner.args
            while isinstance(result, (tuple, list)):
                (result,) = result
            found = known.get(result)
            return found if isinstance(found, Node) else None
        elif inner.op == "call_function" and _broadcasts(inner):
            known[inner] = evaluate_node(inner, known, inserted)
        else:
            return None
    return None


def _broadcasts(inner: Node) -> bool:
    """Whether an op on scalars does the same for each entry of tensors."""
    value = tensor_value(inner)
    if value is None or value.dim():
        return False
    if is_call(inner, aten.index):  # a number looked up, one index for every dim
        table, indices = inner.args
        assert isinstance(table, Node) and isinstance(indices, (tuple, list))
        return len(shape_of(table)) == len(indices) and None not in indices
    facts = facts_of(inner.target)
    made = facts is not None and facts.kind is OpKind.CREATION and not facts.random
    return made or (facts is not None and (facts.kind is OpKind.POINTWISE or facts.spreads))


def _blocks_agree(captured: CapturedGraph, blocks: Sequence[Any], mask: Node) -> bool:
    """Whether the lists of blocks, by which a kernel skips work, leave out nothing that the mask shows."""
    lists, (rows, columns) = blocks[2:6], blocks[-3:-1]
    longest = BLOCKS_TRIED * max(int(rows), int(columns)) + 3
    if longest > LONGEST_TRIED:  # one block for all
        return True
    kinds = captured.analysis(classify)
    nodes = [n for n in (*lists, mask) if isinstance(n, Node)]
    if any(kinds[n] is Dependence.DATA for n in nodes):
        return kinds[mask] is Dependence.DATA  # a mask by token values is refused where it is read
    try:
        evaluator = captured.analysis(shape_evaluator)
        with evaluator.deciding("the blocks that a mask leaves out"):
            values = evaluator.evaluate_all(nodes, 2, longest)
    except Exception:  # lists made for one length
        return False
    partial, full = (_listed(*(values.get(n) for n in pair)) for pair in (lists[:2], lists[2:]))
    shown = values[mask].expand(2, -1, longest, longest)
    here = torch.arange(longest)
    at = (here[:, None] // int(rows), here[None, :] // int(columns))
    none = torch.zeros((), dtype=torch.bool)
    skipped = ~(
        (none if partial is None else partial[..., at[0], at[1]]) | (none if full is None else full[..., at[0], at[1]])
    )
    unmasked = none if full is None else full[..., at[0], at[1]]
    return not bool((shown & skipped).any()) and not bool((~shown & unmasked).any())


def _listed(counts: Tensor | None, indices: Tensor | None) -> Tensor | None:
    """Which blocks ``[..., rows, columns]`` are among the first ``counts`` of ``indices``."""
    if counts is None or indices is None:
        return None
    width = indices.shape[-1]
    valid = torch.arange(width, device=indices.device) < counts[..., None]
    named = torch.where(valid, indices.long(), width)
    found = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, named, True)[..., :width]
