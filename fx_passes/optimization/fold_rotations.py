"""``fold-rotations``: a rotation of stored rows becomes part of the weights before them, or behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kvpass.fx_passes.graph import (
    CapturedGraph,
    PassResult,
    arguments,
    aten,
    describe,
    emit,
    hold,
    is_call,
    module_path,
    record_values,
)
from kvpass.fx_passes.optimization.merge_projections import drop_unread
from kvpass.fx_passes.optimization.step_graph import RowRotation, StepGraph
from kvpass.fx_passes.optimization.step_moves import TOKENS, NotMoved, StepMoves, is_step_move
from kvpass.fx_passes.planning.linear_maps import LinearMap, has_plain_parameters, parameters_of, read_linear_map
from kvpass.types import FoldedRotation

ROUNDINGS = 16.0  # that results may be off, of the weights' dtype, relative to the largest
OUTPUT = "output"


@dataclass(frozen=True, eq=False)
class _Derived:
    """What takes the place of a linear map's parameters: weight ``[out, in]``, bias ``[out]`` or None for the same.

    ``key`` tells what they were made of: maps of equal keys have equal parameters.
    """

    projection: LinearMap
    weight: Tensor
    bias: Tensor | None
    key: tuple[object, ...]


@dataclass(frozen=True)
class FoldRotations:
    """Fold rotations into weights where the graph allows it.

    Before: products with a constant matrix beside cache writes and reads, computed at each step.
    After: rows that are results of a linear map come out of it rotated, by weights whose rows are; rows that only a
        linear map reads go into it as they are, by weights whose columns are rotated. These weights are parameters of
        the rewrite's own: the model's stay as they are, and a later change of them does not count here.
    Requires: a paged graph, before its moves are joined and its projections merged. What it returns beside the logits
        stays as it was.
    Refuses: nothing. A rotation stays where anything but moves (or, behind it, a factor that a whole block has in
        common) stands between it and the linear map, where somebody else reads the same entries, or where the weights
        are no plain parameters. Each fold is compared with what was there, in float64, before it is accepted.

    Attributes:
        enabled: whether anything is folded.
    """

    enabled: bool = True
    name: str = "fold-rotations"

    def apply(self, step: StepGraph) -> PassResult:
        """Try each rotation, in order."""
        if not self.enabled:
            return PassResult()
        step.folded = tuple(fold_rotations(step.captured, step.rotations))
        step.derived_bytes = derived_bytes(step.captured)
        return PassResult(sum(not fold.reason for fold in step.folded))


def fold_rotations(captured: CapturedGraph, rotations: Sequence[RowRotation]) -> list[FoldedRotation]:
    """Fold rotations into weights where the graph allows it; gives what became of each, in order."""
    before = [str(node.target) for node in captured.graph.nodes if node.op == "get_attr"]
    known: dict[tuple[object, ...], str] = {}
    found = []
    with torch.no_grad():
        for rotation in rotations:
            where, reason = module_path(rotation.rows, captured), ""
            try:
                fold = _fold_behind if rotation.role == OUTPUT else _fold_before
                derived = fold(captured, rotation)
            except NotMoved as error:
                reason = str(error)
            else:
                _take_out(captured, rotation)
                for each in derived:
                    where = module_path(each.projection.node, captured)
                    _replace(captured, each, known)
            found.append(FoldedRotation(rotation.cache, rotation.role, where, reason))
    if known:
        captured.tidy()
        drop_unread(captured, [*before, *(name for name, _ in captured.module.named_parameters() if is_derived(name))])
    return found


def derived_bytes(captured: CapturedGraph) -> int:
    """Bytes of the parameters that rotations are part of; to be asked before projections are merged."""
    return sum(p.nbytes for name, p in captured.module.named_parameters() if is_derived(name))


def is_derived(name: str) -> bool:
    """Whether a parameter of that name was made by this pass."""
    return name.startswith("_rotated_")


def _fold_before(captured: CapturedGraph, rotation: RowRotation) -> list[_Derived]:
    """Parameters of the linear maps whose results the rows are, so that these come out rotated."""
    moves = StepMoves(captured)
    path, sources = moves.before(rotation.rows)
    projections = [_projection(captured, node) for node in sources]
    widths = [moves.shape(node)[-1] for node in sources]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    total = sum(widths)
    numbers = {
        node: moves.tokens_of(node)[:, None] * total + start + torch.arange(width)
        for node, start, width in zip(sources, starts, widths, strict=True)
    }
    given = {node: number.view(moves.shape(node)) for node, number in numbers.items()}
    rows = moves.run(path, given)[rotation.rows]
    places = rows % total
    if (rows < 0).any() or not torch.equal(rows // total, torch.arange(TOKENS)[:, None, None].expand_as(rows)):
        raise NotMoved("its rows hold entries of other tokens, or constants")
    if not torch.equal(places[:1].expand_as(places), places):
        raise NotMoved("its rows are put together differently from token to token")
    blocks = places[0].reshape(-1, len(rotation.matrix))
    if len(blocks.unique()) < blocks.numel():
        raise NotMoved("an entry stands in its rows twice")
    owner = torch.bucketize(blocks, torch.tensor([*starts[1:], total]), right=True)
    if not torch.equal(owner[:, :1].expand_as(owner), owner):
        raise NotMoved("a block is put together from several linear maps")
    for node, number in given.items():
        _check_readers(moves, node, number, set(blocks.flatten().tolist()), total, rotation)
    derived = []
    for index, (projection, start) in enumerate(zip(projections, starts, strict=True)):
        own = blocks[owner[:, 0] == index] - start
        weight, bias = parameters_of(captured, projection)
        turned = _turn(weight, own, rotation.matrix.mT)
        turned_bias = None if bias is None else _turn(bias[:, None], own, rotation.matrix.mT)[:, 0]
        derived.append(_Derived(projection, turned, turned_bias, _key(projection, own, "rows")))
    before: dict[Node, Any] = {}
    after: dict[Node, Any] = {}
    for each in derived:
        node, source = each.projection.node, each.projection.source
        inputs = torch.randn(moves.shape(source), dtype=torch.float64, generator=moves.generator)
        before[node] = _map(inputs, *parameters_of(captured, each.projection))
        after[node] = _map(inputs, each.weight, each.bias)
    plain, turned = (moves.run(path, results)[rotation.rows] for results in (before, after))
    _assert_equal(turned, rotation.apply(plain), derived[0].weight.dtype)
    return derived


def _fold_behind(captured: CapturedGraph, rotation: RowRotation) -> list[_Derived]:
    """Parameters of the linear maps that read the rotated rows, so that they take them as they were."""
    moves = StepMoves(captured)
    shape = moves.shape(rotation.result)
    total, block = shape[1] * shape[2], len(rotation.matrix)
    numbers = {rotation.result: torch.arange(TOKENS * total).view(shape)}
    path, projections = _readers_behind(moves, rotation.result, numbers, block)
    derived = []
    for projection in projections:
        rows = numbers[projection.source].flatten(0, -2)
        there = rows >= 0
        token = torch.where(there, rows // total, -1).amax(1, keepdim=True)
        places = torch.where(there, rows % total, -1)
        if (there & (rows // total != token)).any() or not torch.equal(places[:1].expand_as(places), places):
            raise NotMoved(f"{describe(projection.node)} reads rows that are put together differently")
        columns = torch.full((total,), -1)
        held = places[0, there[0]]
        columns[held] = there[0].nonzero()[:, 0]
        blocks = columns.view(-1, block)
        whole = (blocks >= 0).all(1)
        if len(held.unique()) < len(held) or ((blocks >= 0).any(1) & ~whole).any():
            raise NotMoved(f"{describe(projection.node)} reads a part of a block, or an entry twice")
        weight, _ = parameters_of(captured, projection)
        turned = _turn(weight.mT, blocks[whole], rotation.matrix).mT
        derived.append(_Derived(projection, turned, None, _key(projection, blocks[whole], "columns")))
    if not derived:
        raise NotMoved("no linear map reads its result")
    given = torch.randn(shape, dtype=torch.float64, generator=moves.generator)
    as_read, as_rotated = (moves.run(path, {rotation.result: each}) for each in (given, rotation.apply(given)))
    for each in derived:
        source, (weight, bias) = each.projection.source, parameters_of(captured, each.projection)
        wanted = _map(as_rotated[source], weight, bias)
        _assert_equal(_map(as_read[source], each.weight, bias), wanted, weight.dtype)
    return derived


def _readers_behind(
    moves: StepMoves, start: Node, numbers: dict[Node, Any], block: int
) -> tuple[list[Node], list[LinearMap]]:
    """The moves behind a node, whose numbers are added to ``numbers``, and the linear maps at their ends."""
    path: list[Node] = []
    projections: list[LinearMap] = []
    for node in moves.after(start, numbers):
        if node.op == "output":  # what is moved alone is rotated where it is returned
            if not all(_is_moved_from(n, start) for n in node.all_input_nodes if n in numbers):
                raise NotMoved("the graph returns its result")
            continue
        projection = read_linear_map(node)
        if projection is not None and projection.source in numbers:
            projections.append(_checked(moves.captured, projection))
        elif is_step_move(node):
            numbers[node] = moves.evaluate(node, numbers)
            path.append(node)
        else:
            numbers[node] = _scaled_numbers(moves, node, numbers, block)
            path.append(node)
    return path, projections


def _scaled_numbers(moves: StepMoves, node: Node, numbers: dict[Node, Any], block: int) -> Tensor:
    """The numbers of a product with, or a quotient by, a factor that each block of entries has in common.

    Raises:
        NotMoved: if the node is anything else.
    """
    refusal = NotMoved(f"{describe(node)} reads its result")
    if not is_call(node, aten.mul, aten.div):
        raise refusal
    named = arguments(node)
    given, factor = named["self"], named["other"]
    if given not in numbers:
        given, factor = factor, given
    if factor in numbers or given not in numbers or named.get("rounding_mode") is not None:
        raise refusal
    if is_call(node, aten.div) and given is not named["self"]:
        raise refusal
    result: Tensor = numbers[given].expand(moves.shape(node))
    if not isinstance(factor, Node):
        return result
    shape = moves.shape(factor)
    which = torch.arange(math.prod(shape)).view(shape).expand(result.shape)
    there = result >= 0
    groups = result[there] // block
    lowest, highest = (torch.zeros(int(groups.max()) + 1, dtype=torch.int64) for _ in range(2))
    lowest.scatter_reduce_(0, groups, which[there], "amin", include_self=False)
    highest.scatter_reduce_(0, groups, which[there], "amax", include_self=False)
    if not torch.equal(lowest, highest):
        raise refusal
    return result


def _check_readers(
    moves: StepMoves, source: Node, given: Tensor, entries: set[int], total: int, rotation: RowRotation
) -> None:
    """Raise unless nothing but the rotation reads ``entries`` of a linear map's result."""
    numbers: dict[Node, Any] = {source: given}
    for node in moves.after(source, numbers):
        if node in rotation.nodes:
            continue
        if is_step_move(node):
            numbers[node] = moves.evaluate(node, numbers)
            continue
        for value in (numbers[n] for n in node.all_input_nodes if n in numbers):
            for tensor in [value] if isinstance(value, Tensor) else value:
                if entries & set((tensor[tensor >= 0] % total).tolist()):
                    raise NotMoved(f"{describe(node)} reads the same entries")


def _projection(captured: CapturedGraph, node: Node) -> LinearMap:
    projection = read_linear_map(node)
    if projection is None:
        raise NotMoved(f"{describe(node)} computes its rows")
    return _checked(captured, projection)


def _checked(captured: CapturedGraph, projection: LinearMap) -> LinearMap:
    if not has_plain_parameters(captured, projection):
        raise NotMoved(f"the weights of {describe(projection.node)} are no plain tensors of floats")
    return projection


def _turn(weight: Tensor, blocks: Tensor, matrix: Tensor) -> Tensor:
    """A copy of ``weight [n, m]`` with ``matrix [b, b]`` times each of its blocks of rows, ``blocks [N, b]``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    turned, where = weight.clone(), blocks.to(weight.device)
    turned[where] = (matrix.to(weight.device, wide) @ weight[where].to(wide)).to(weight.dtype)
    return turned


def _key(projection: LinearMap, blocks: Tensor, side: str) -> tuple[object, ...]:
    bias = None if projection.bias is None else projection.bias.target
    return (
        projection.weight.target,
        projection.transposed,
        bias,
        side,
        blocks.shape[1],
        tuple(blocks.flatten().tolist()),
    )


def _take_out(captured: CapturedGraph, rotation: RowRotation) -> None:
    """Rows are no longer rotated, but where the graph returns them."""
    end = next(node for node in reversed(captured.graph.nodes) if node.op == "output")
    rotation.result.replace_all_uses_with(rotation.rows)
    for node in {node for node in end.all_input_nodes if _is_moved_from(node, rotation.rows)}:
        block = len(rotation.matrix)
        with captured.graph.inserting_before(end):
            cut = emit(captured, aten.unflatten.int, node, -1, [-1, block], like=node)
            turned = emit(captured, aten.matmul.default, cut, rotation.matrix_node, like=node)
            whole = emit(captured, aten.flatten.using_ints, turned, -2, -1, like=node)
        end.replace_input_with(node, whole)
    for node in reversed(rotation.nodes):
        captured.graph.erase_node(node)


def _is_moved_from(node: Node, rows: Node) -> bool:
    """Whether a node holds rows as they are, in another order."""
    while node is not rows:
        if not is_step_move(node):
            return False
        source = node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    return True


def _map(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of rows ``[..., in]`` in float64."""
    return nn.functional.linear(rows, weight.cpu().double(), None if bias is None else bias.cpu().double())


def _assert_equal(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Raise unless two results are equal but for the rounding of weights of ``dtype``."""
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not error <= ROUNDINGS * torch.finfo(dtype).eps:
        raise NotMoved(f"with rotated weights the result differs by {error:.1e}, relative to the largest")


def _replace(captured: CapturedGraph, derived: _Derived, known: dict[tuple[object, ...], str]) -> None:
    """Put a linear map with the derived parameters in the place of the projection; equal ones are held once."""
    old = derived.projection.node
    if derived.key not in known:
        replaced = [derived.projection.weight, *([] if derived.bias is None else [derived.projection.bias])]
        record_values(captured, [n for n in replaced if n is not None], "a rotated copy of it")
        known[derived.key] = f"_rotated_{len(known)}"
        for tensor, part in ((derived.weight, "weight"), (derived.bias, "bias")):
            if tensor is not None:
                with torch.inference_mode(False):
                    parameter = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)
                captured.module.register_parameter(f"{known[derived.key]}_{part}", parameter)
    with captured.graph.inserting_before(old):
        weight = hold(captured, f"{known[derived.key]}_weight")
        bias = derived.projection.bias if derived.bias is None else hold(captured, f"{known[derived.key]}_bias")
        result = emit(captured, aten.linear.default, derived.projection.source, weight, bias, like=old)
    old.replace_all_uses_with(result)
    captured.graph.erase_node(old)
