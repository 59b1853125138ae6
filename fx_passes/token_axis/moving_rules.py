"""Axis rules of ops that move entries and compute nothing: reshapes, slices, concatenations."""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from kvpass.fx_passes.graph import expression, shape_of
from kvpass.fx_passes.token_axis.axes import (
    Axes,
    Dim,
    Factor,
    Kind,
    MixesTokens,
    broadcast,
    is_free,
    is_score,
    merge_dims,
    plain,
    relabel,
)
from kvpass.fx_passes.token_axis.group_rules import is_picked, join_rows, split_rows
from kvpass.fx_passes.token_axis.infer_axes import AxisRule, Inference, Several, checked


def reshape(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    return relabel(inference.axes(node.args[0]), shape_of(node))


def permute(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["self"])
    return tuple(axes[d % len(axes)] for d in named["dims"])


def transpose(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    a, b = named["dim0"], named["dim1"]
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def unsqueeze(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    axes.insert(named["dim"] % (len(axes) + 1), ())
    return tuple(axes)


def squeeze(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["self"])
    dims = named.get("dim")
    chosen = range(len(axes)) if dims is None else [d % len(axes) for d in ([dims] if isinstance(dims, int) else dims)]
    return tuple(dim for i, dim in enumerate(axes) if dim or i not in chosen)


def expand(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["self"])
    shape = shape_of(node)
    padded: list[Dim] = [()] * (len(shape) - len(axes)) + list(axes)
    return checked([dim or inference.dim_of_size(size) for dim, size in zip(padded, shape, strict=True)])


def repeat(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["self"])
    repeats = named["repeats"]
    padded: list[Dim] = [()] * (len(repeats) - len(axes)) + list(axes)
    out: list[Dim] = []
    for dim, times, size in zip(padded, repeats, shape_of(node), strict=True):
        if expression(times) == 1:
            out.append(dim)
        elif not dim:
            out.append(inference.dim_of_size(size))
        elif is_free(dim):
            out.append(plain(size))
        else:
            raise MixesTokens("repeats the sequence")
    return checked(out)


def repeat_interleave(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    if named.get("dim") is None or not isinstance(named["repeats"], int):
        raise MixesTokens("repeats entries a number of times that depends on data")
    d = named["dim"] % len(axes)
    axes[d] = (
        (*axes[d], Factor(Kind.PLAIN, expression(named["repeats"])))
        if axes[d] and not is_free(axes[d])
        else plain(shape_of(node)[d])
    )
    return tuple(axes)


def cat(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    operands = [n for n in named["tensors"] if shape_of(n) != (0,)]
    shape = shape_of(node)
    d = named["dim"] % len(shape)
    scores = [n for n in operands if inference.is_data(n) and is_score(inference.axes(n))]
    if scores:
        return _beside_scores(inference, scores, operands, d, shape)
    all_axes = [inference.axes(n) for n in operands]
    joined = [axes[d] for axes in all_axes]
    rest = broadcast([tuple(dim for i, dim in enumerate(axes) if i != d) for axes in all_axes], len(shape) - 1)
    rows = join_rows(inference, joined)
    if rows is None and not all(is_free(dim) for dim in joined):
        raise MixesTokens("joins tensors along the token axis")
    return (*rest[:d], plain(shape[d]) if rows is None else rows, *rest[d:])


def _beside_scores(
    inference: Inference, scores: list[Node], operands: list[Node], d: int, shape: tuple[sympy.Expr, ...]
) -> Axes:
    """A column of sinks beside the keys; what it holds, the reader of the softmax checks."""
    axes = inference.axes(scores[0])
    key = axes[d]
    others = [n for n in operands if n is not scores[0]]
    if len(key) != 1 or key[0].kind not in (Kind.LEFT, Kind.RIGHT) or any(inference.is_data(n) for n in others):
        raise MixesTokens("joins scores with something else than constant columns")
    return (*axes[:d], (Factor(key[0].kind, shape[d]),), *axes[d + 1 :])


def stack(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    shape = shape_of(node)
    rest = broadcast([inference.axes(n) for n in named["tensors"]], len(shape) - 1)
    d = named["dim"] % len(shape)
    return (*rest[:d], plain(shape[d]), *rest[d:])


def _is_heads(dim: Dim) -> bool:
    return bool(dim) and all(f.kind is Kind.HEAD for f in dim)


def _of(dim: Dim, what: str) -> str:
    return f"{what} the heads of scores" if _is_heads(dim) else f"{what} the sequence"


def narrow(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """``slice``, ``narrow`` and ``unfold`` along dims that hold no tokens; scores may lose key columns."""
    axes = list(inference.axes(named["self"]))
    d = named.get("dim", named.get("dimension", 0)) % len(axes)
    size = shape_of(node)[d]
    if len(axes[d]) == 1 and axes[d][0].kind in (Kind.LEFT, Kind.RIGHT):
        axes[d] = (Factor(axes[d][0].kind, size),)
        return tuple(axes)
    if not is_free(axes[d]):
        raise MixesTokens(_of(axes[d], "takes a part of"))
    if not expression(named.get("start") or 0).is_number:
        raise MixesTokens("takes a part that depends on the batch size or the length")
    axes[d] = plain(size)
    return (*axes, plain(shape_of(node)[-1])) if len(shape_of(node)) > len(axes) else tuple(axes)


def select(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    d = named["dim"] % len(axes)
    if not is_free(axes[d]):
        raise MixesTokens("picks a head out of scores" if _is_heads(axes[d]) else "picks out one token or one sequence")
    del axes[d]
    return tuple(axes)


def split(inference: Inference, node: Node, named: dict[str, Any]) -> Several:
    axes = inference.axes(named["self"])
    d = named["dim"] % len(axes)
    if is_picked(axes[d]):
        return Several(tuple((*axes[:d], part, *axes[d + 1 :]) for part in split_rows(inference, node, axes[d])))
    if not is_free(axes[d]):
        raise MixesTokens(_of(axes[d], "splits"))
    parts = []
    for value in node.meta["val"]:
        kept = list(axes)
        if value.dim() == len(axes):
            kept[d] = plain(expression(value.shape[d]))
        else:
            del kept[d]
        parts.append(tuple(kept))
    return Several(tuple(parts))


def slice_scatter(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Writes ``src`` into a part of ``self``, along a dim that holds no tokens."""
    axes, source = inference.axes(named["self"]), inference.axes(named["src"])
    d = named["dim"] % len(axes)
    if not (is_free(axes[d]) and (d >= len(source) or is_free(source[d]))):
        raise MixesTokens(_of(axes[d], "writes into a part of"))
    if not expression(named.get("start") or 0).is_number:
        raise MixesTokens("writes to a part that depends on the batch size or the length")
    if "index" in named:
        source = (*source[:d], (), *source[d:])
    pairs = enumerate(zip(axes, source, strict=True))
    return checked([own if i == d else merge_dims([own, new]) for i, (own, new) in pairs])


MOVING_RULES: dict[str, AxisRule] = {
    rule.__name__: rule
    for rule in (
        reshape, permute, transpose, unsqueeze, squeeze, expand, repeat, repeat_interleave, cat, stack, narrow, select,
        split, slice_scatter,
    )
}  # fmt: skip
