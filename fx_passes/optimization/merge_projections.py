"""``merge-projections``: linear maps of one input, such as those to queries, keys and values, become one product."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, aten, emit, hold, read_attribute, shape_of
from kvpass.fx_passes.optimization.step_graph import StepGraph
from kvpass.fx_passes.planning.linear_maps import Projection, read_projection

# Entries of a weight from which on a product of its own is as fast as a share of a common one, or faster: the time of a
# call is nothing against it, and what reads a share of the result reads rows that are apart (benchmarks/clean_up.py).
LARGE_ON_CPU = 1 << 17


@dataclass(frozen=True)
class MergeProjections:
    """Make one product of linear maps of one input.

    The weights are joined in one tensor, and the model's parameters become views of it, with the same values, shapes
    and strides: no weight is held twice, and a change of a parameter in place counts as before.

    Before: several linear maps of one node, each with parameters of its own.
    After: one of them all, its result split along the last dim, which moves nothing.
    Requires: a graph whose every other rewrite is done: the cut goes through projections one by one.
    Refuses: nothing. On a CPU large weights are left alone, whose products are faster one by one; and so is anywhere
        a parameter that is not dense and row by row, is no plain tensor, or shares its memory with something else.
    """

    name: str = "merge-projections"

    def apply(self, step: StepGraph) -> PassResult:
        """Merge those of each input."""
        return PassResult(merge_projections(step.captured))


def merge_projections(captured: CapturedGraph) -> int:
    """Merge linear maps of one input; gives how many there were."""
    groups: dict[tuple[Node, bool], list[Projection]] = {}
    for node in captured.graph.nodes:
        found = read_projection(node)
        if found is not None:
            groups.setdefault((found.source, found.bias is None), []).append(found)
    before = [str(node.target) for node in captured.graph.nodes if node.op == "get_attr"]
    merged = sum(_merge(captured, group) for group in groups.values() if len(group) > 1)
    if merged:
        captured.tidy()
        drop_unread(captured, before)
    return merged


def _merge(captured: CapturedGraph, group: Sequence[Projection]) -> int:
    """Merge those projections of one input whose parameters can be joined; gives how many these are."""
    distinct: dict[int, Projection] = {}
    for projection in _that_pay(group):
        if all(map(is_plain, _parameters(captured, projection))):
            distinct.setdefault(_parameters(captured, projection)[0].data_ptr(), projection)
    projections = sorted(distinct.values(), key=lambda p: _parameters(captured, p)[0].storage_offset())
    if not all(map(are_adjacent, _columns(captured, projections))):
        projections = [p for p in distinct.values() if all(map(owns_its_memory, _parameters(captured, p)))]
    if len(projections) < 2:
        return 0
    like = next(p for p in group if p in projections)
    sizes = [int(shape_of(p.weight)[0]) for p in projections]
    with captured.graph.inserting_before(like.node):
        joined = [_read(captured, join_rows(column), like.node) for column in _columns(captured, projections)]
        whole = emit(captured, aten.linear.default, like.source, *joined, like=like.node)
        parts = emit(captured, aten.split_with_sizes.default, whole, sizes, -1, like=like.node)
        for place, projection in enumerate(projections):
            for read in _reads(projection):
                captured.ledger.join(str(read.target), read_attribute(captured.module, str(read.target)))
            part = captured.graph.call_function(operator.getitem, (parts, place))
            part.meta = dict(projection.node.meta)
            projection.node.replace_all_uses_with(part)
    return len(projections)


def _that_pay(group: Sequence[Projection]) -> list[Projection]:
    """Those that are faster as one product: elsewhere all of them, on a CPU the small ones and one large one."""
    if group[0].weight.meta["val"].device.type != "cpu":
        return list(group)
    large = [p for p in group if p.weight.meta["val"].numel() >= LARGE_ON_CPU]
    return [p for p in group if p not in large[1:]]


def _parameters(captured: CapturedGraph, projection: Projection) -> list[Tensor]:
    return [read_attribute(captured.module, str(node.target)) for node in _reads(projection)]


def _reads(projection: Projection) -> list[Node]:
    return [node for node in (projection.weight, projection.bias) if node is not None]


def _columns(captured: CapturedGraph, projections: Sequence[Projection]) -> list[tuple[Tensor, ...]]:
    """The weights of all of them, and their biases where they have such."""
    return list(zip(*(_parameters(captured, p) for p in projections), strict=True))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of no special kind, and its rows lie one after the other."""
    special = type(tensor) is not nn.Parameter or tensor.layout is not torch.strided or tensor.is_inference()
    return not special and tensor.is_contiguous() and tensor.numel() > 0


def are_adjacent(parameters: Sequence[Tensor]) -> bool:
    """Whether each of them begins where the one before ends, as they do once they were joined."""
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in itertools.pairwise(parameters)
    )


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether nothing else is known to use the memory of a tensor: no view, no second tensor, no other process."""
    storage = tensor.untyped_storage()
    alone = _owners(tensor) <= _owners(torch.empty(1))
    shared = tensor.device.type == "cpu" and storage.is_shared()
    return alone and not shared and storage.nbytes() == tensor.numel() * tensor.element_size()


def _owners(tensor: Tensor) -> int:
    """How many tensors and Python objects hold the memory of a tensor."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@torch.no_grad()
def join_rows(parameters: Sequence[Tensor]) -> nn.Parameter:
    """One parameter ``[sum of rows, ...]`` that holds the given ones in order; they become views of it."""
    with torch.inference_mode(False):  # or the result could not be trained
        if are_adjacent(parameters):
            first = parameters[0].detach()
            rows = sum(len(parameter) for parameter in parameters)
            return nn.Parameter(first.as_strided((rows, *first.shape[1:]), first.stride()), requires_grad=False)
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, rows_of in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = rows_of
        return nn.Parameter(whole, requires_grad=False)


def _read(captured: CapturedGraph, whole: nn.Parameter, like: Node) -> Node:
    name = f"_merged_{like.name}_{'weight' if whole.dim() == 2 else 'bias'}"
    return hold(captured, name, whole)


def drop_unread(captured: CapturedGraph, names: Sequence[str]) -> None:
    """Drop parameters from the rewritten module that its graph no longer reads."""
    read = {str(node.target) for node in captured.graph.nodes if node.op == "get_attr"}
    for name in dict.fromkeys(names):
        if name not in read:
            path, _, leaf = name.rpartition(".")
            delattr(captured.module.get_submodule(path), leaf)
