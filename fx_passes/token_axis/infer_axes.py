"""Follow the token axis through a graph: one rule per op, and no rule means no proof."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, arguments, expression, is_symbolic_scalar, shape_of, tensor_value
from kvpass.fx_passes.op_facts.facts import OpFacts
from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.shape_values import Dependence, is_random, reads_shape_only
from kvpass.fx_passes.token_axis.axes import (
    Axes,
    Dim,
    Factor,
    Kind,
    Mixed,
    MixesTokens,
    broadcast,
    check,
    is_free,
    is_score,
    plain,
    uniform,
)


@dataclass(frozen=True)
class Several:
    """Axes of an op with several results."""

    parts: tuple[Axes, ...]


@dataclass(frozen=True)
class Part:
    """Some of the picked rows: the ``index``-th of ``count`` groups of the rows ``of``."""

    of: Dim
    index: int
    count: int


@dataclass
class Inference:
    """State of one walk over the graph.

    Attributes:
        captured: the graph.
        kinds: what each node depends on.
        sources: axes given from outside, for nodes that count positions.
        with_scores: whether products of tokens with tokens are followed (to find attention) or refused (to prove that
            none is left).
        results: axes of every node so far.
        next_tag: last name given to a head or a pick.
        picks: ops that pick rows of tokens by data, and the name of each pick.
        part_tags: name of each group of picked rows, by the name of the pick and the number of the group.
        parts: what each such name stands for.
    """

    captured: CapturedGraph
    kinds: dict[Node, Dependence]
    sources: dict[Node, Axes] = field(default_factory=dict)
    with_scores: bool = False
    results: dict[Node, Axes | Several | Mixed] = field(default_factory=dict)
    next_tag: int = 0
    picks: dict[Node, int] = field(default_factory=dict)
    part_tags: dict[tuple[int, int], int] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)

    def axes(self, node: Any) -> Axes:
        """Axes of a tensor operand.

        Raises:
            Blocked: if they could not be established.
        """
        found = self.results[node]
        if isinstance(found, Mixed):
            raise Blocked(found)
        if isinstance(found, Several):
            raise MixesTokens("uses an op with several results as one tensor")
        return found

    def is_data(self, node: Any) -> bool:
        """Whether a node depends on the tokens."""
        return isinstance(node, Node) and self.kinds[node] is Dependence.DATA

    def tensors(self, node: Node) -> list[Node]:
        """Tensor operands of a node, in order."""
        return [n for n in node.all_input_nodes if tensor_value(n) is not None]

    def fresh_tag(self) -> int:
        """A new name for a head factor."""
        self.next_tag += 1
        return self.next_tag

    def dim_of_size(self, size: Any) -> Dim:
        """The meaning of a broadcast dim: the batch or the tokens where it has their size."""
        size = expression(size)
        if size == self.captured.batch:
            return (Factor(Kind.BATCH, size),)
        if size == self.captured.length:
            return (Factor(Kind.TOKEN, size),)
        if not size.is_number:
            raise MixesTokens("makes a dim whose size is a mixture of batch and length")
        return plain(size)


class Blocked(Exception):
    """An operand mixes tokens already."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__(mixed.reason)
        self.mixed = mixed


AxisRule = Callable[[Inference, Node, dict[str, Any]], "Axes | Several"]

# Arguments that are sizes: they may hold the batch size and length.
SIZE_ARGUMENTS = {
    "size",
    "shape",
    "sizes",
    "repeats",
    "start",
    "end",
    "split_size",
    "split_sizes",
    "length",
    "output_size",
}


def infer_axes(inference: Inference, rules: dict[str, AxisRule]) -> dict[Node, Axes | Several | Mixed]:
    """Axes of every tensor node, or why it has none. ``rules`` has the rules that op facts name."""
    for node in inference.captured.graph.nodes:
        if node.op == "output" or not _is_tensor_node(node):
            continue
        result: Axes | Several | Mixed
        try:
            result = inference.sources.get(node) or _axes_of(inference, node, rules)
            if not isinstance(result, Several):
                _check_sizes(node, result)
        except Blocked as blocked:
            result = blocked.mixed
        except MixesTokens as error:
            result = Mixed(str(error), node)
        inference.results[node] = result
    return inference.results


def _is_tensor_node(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, (torch.Tensor, tuple, list))


def _axes_of(inference: Inference, node: Node, rules: dict[str, AxisRule]) -> Axes | Several:
    if node.op == "get_attr":
        return uniform(shape_of(node))
    if node.op == "placeholder":
        return tuple(inference.dim_of_size(s) for s in shape_of(node))
    if inference.kinds[node] is Dependence.CONSTANT:
        return _constant_axes(node)
    if is_random(node):
        raise MixesTokens("draws random numbers")
    if reads_shape_only(node):
        return _filled(inference, node)
    if node.target is operator.getitem:
        several = inference.results[node.args[0]]  # type: ignore[index]
        if isinstance(several, Mixed):
            raise Blocked(several)
        assert isinstance(several, Several) and isinstance(node.args[1], int)
        return several.parts[node.args[1]]
    named = arguments(node)
    if computes_with_sizes(named):
        raise MixesTokens("computes with the batch size or the length of the sequence")
    facts = facts_of(node.target)
    if facts is None or not facts.axes:
        raise MixesTokens("is an op for which kvpass has no proof that it treats tokens one by one")
    check_operands(inference, named, facts)
    return rules[facts.axes](inference, node, named)


def check_operands(inference: Inference, named: dict[str, Any], facts: OpFacts) -> None:
    """Whatever an op takes beside the operands that may carry tokens is a constant, for every op alike.

    Raises:
        MixesTokens: naming the operand that depends on the tokens, on positions, on the length or on the batch.
    """
    if facts.tokens is None:
        return
    for name, value in named.items():
        if name in facts.tokens:
            continue
        for operand in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(operand, Node) or tensor_value(operand) is None:
                continue
            if inference.is_data(operand):
                raise MixesTokens(f"takes its {name} from the tokens: it must be a constant")
            if any(factor.kind is not Kind.PLAIN for dim in inference.axes(operand) for factor in dim):
                raise MixesTokens(f"takes its {name} from positions, or in the size of the sequence or the batch")


def _constant_axes(node: Node) -> Axes | Several:
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return uniform(shape_of(node))
    return Several(tuple(tuple(plain(int(s)) for s in v.shape) for v in val))


def _filled(inference: Inference, node: Node) -> Axes:
    """``zeros_like`` and its kin hold one value everywhere."""
    named = arguments(node)
    if any(is_symbolic_scalar(v) for k, v in named.items() if k not in SIZE_ARGUMENTS):
        raise MixesTokens("fills a tensor with a number that depends on the batch size or length")
    return uniform(shape_of(node))


def computes_with_sizes(named: dict[str, Any]) -> bool:
    """Whether a batch size or length is among the arguments of an op where no size belongs."""
    return any(
        key not in SIZE_ARGUMENTS and is_symbolic_scalar(number) and not expression(number).is_number
        for key, value in named.items()
        for number in (value if isinstance(value, (list, tuple)) else [value])
    )


def _check_sizes(node: Node, axes: Axes) -> None:
    """The factors of every dim multiply to its size: a rule that forgot something is found here."""
    for dim, size in zip(axes, shape_of(node), strict=True):
        if len(dim) == 1 and dim[0].kind is Kind.PICKED:  # how many rows there are, data says; the tag says which
            continue
        product = 1
        for factor in dim:
            product = product * factor.size
            if factor.kind in (Kind.PLAIN, Kind.FEATURE) and not factor.size.is_number:
                raise MixesTokens("makes a dim of features whose size is the batch size or the length")
        if product != size and (product - size).expand() != 0:
            raise MixesTokens("gives a shape that cannot be followed")


def pointwise(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Elementwise with broadcasting. What is added to scores may have any meaning: it is read as their bias."""
    operands = inference.tensors(node)
    scores = [n for n in operands if inference.is_data(n) and is_score(inference.axes(n))]
    data_first = sorted(operands, key=lambda n: not inference.is_data(n))
    considered = [n for n in operands if inference.is_data(n)] if scores else data_first
    return broadcast([inference.axes(n) for n in considered], len(shape_of(node)))


def along(inference: Inference, node: Node, axes: Axes, dims: Any) -> list[int]:
    """Dims that an op works along, counted from 0.

    Raises:
        MixesTokens: if one of them holds tokens or sequences. Scores may be worked on along their keys.
    """
    rank = len(axes)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = list(range(rank))
    chosen = [d % rank if rank else 0 for d in ([dims] if isinstance(dims, int) else list(dims))]
    for d in chosen:
        if rank and not is_free(axes[d]) and not _is_keys(inference, axes, d):
            what = "the batch" if Kind.BATCH in {f.kind for f in axes[d]} else "the token axis"
            raise MixesTokens(f"works along {what}")
    return chosen


def _is_keys(inference: Inference, axes: Axes, d: int) -> bool:
    return inference.with_scores and len(axes[d]) == 1 and axes[d][0].kind in (Kind.LEFT, Kind.RIGHT)


def checked(axes: list[Dim]) -> Axes:
    """The axes as a tuple, checked to hold each kind of token once."""
    return check(tuple(axes))
