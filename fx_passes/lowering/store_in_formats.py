"""``store-in-formats``: a paged graph whose caches are exact becomes one whose caches are quantised.

What a format needs around its kernels is put into the graph here, as ordinary ops:

rotation (``int4``; of k4v2 the values)
    A few large dims of a row would take the whole range of 15 codes. Keys are multiplied by a Hadamard matrix before
    they are stored, queries by its inverse, and the products stay what they were; values likewise, with the inverse
    on the attention's output. The matrix is block diagonal, its blocks the largest power of two that divides the row:
    entries are plus or minus a power of two, so the matrix itself is never rounded. https://arxiv.org/abs/2404.00456
scale of a head (``fp8_e4m3``, ``fp8_e5m2``)
    Keys are divided by a power of two before they are stored and queries multiplied by it, values divided and the
    attention's output multiplied. A power of two leaves a number's digits alone; it is chosen by
    :mod:`kvpass.fx_passes.validation.calibrate`, and 1 until then.

``int8`` needs neither: its scales are per token and head, inside the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, aten, emit, hold, is_call
from kvpass.fx_passes.optimization.fold_rotations import OUTPUT
from kvpass.fx_passes.optimization.step_graph import RowRotation, StepGraph
from kvpass.kernels.formats.cache_formats import CacheFormat, find_format
from kvpass.types import CachePlan

ops = torch.ops.kvpass
READS = (ops.paged_attention, ops.latent_attention)
ROTATED = ("int4", "v2")
SCALED_BY_HEAD = ("fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a cache, and what surrounds its reads and writes.

    Attributes:
        placeholder: the graph's input.
        form: its format.
        heads: Hkv.
        block: dims that are rotated together; 1 for no rotation.
    """

    placeholder: Node
    form: CacheFormat
    heads: int
    block: int

    @property
    def name(self) -> str | None:
        """What the ops are told of the format; a float tensor says it itself."""
        return self.form.name if self.form.coded else None

    @property
    def scale(self) -> str | None:
        """Buffer of the scales of its heads, ``[Hkv, 1, 1]``."""
        return f"_scale_{self.placeholder.name}" if self.form.name in SCALED_BY_HEAD else None


@dataclass(frozen=True)
class StoreInFormats:
    """Store caches in the formats that the plan asks for.

    Before: caches that hold what is written exactly, or in a wide float format.
    After: caches in their formats, with rotations and scales of heads around the ops where a format has them. With
        exact caches the rewritten graph still means the same.
    Requires: ``insert-cache``.
    Refuses: nothing.
    """

    name: str = "store-in-formats"

    def apply(self, step: StepGraph) -> PassResult:
        """Surround each write and read."""
        step.cache_plan, step.rotations = store_in_formats(step.captured, step.cache_plan, step.plan.formats)
        return PassResult(len(step.rotations))


def store_in_formats(
    captured: CapturedGraph, plan: CachePlan, formats: Sequence[tuple[str, str]]
) -> tuple[CachePlan, list[RowRotation]]:
    """Rewrite a graph whose caches are inserted so that they are stored in ``formats``, of keys and values of each.

    Gives the plan of the result, and the rotations that were put around the ops.
    """
    stored = replace(
        plan,
        caches=tuple(
            replace(spec, key_format=key, value_format=value)
            for spec, (key, value) in zip(plan.caches, formats, strict=True)
        ),
    )
    changed = {
        f"{part}_cache_{i}"
        for i, (old, new) in enumerate(zip(plan.caches, stored.caches, strict=True))
        for part in ("key", "value")
        if getattr(old, f"{part}_format") != getattr(new, f"{part}_format")
    }
    tensors = {tensor.placeholder: tensor for tensor in _stored_tensors(captured, stored, changed)}
    rotations: list[RowRotation] = []
    for node in list(captured.graph.nodes):
        if is_call(node, ops.write_cache):
            _surround_write(captured, node, tensors, rotations)
        elif is_call(node, *READS):
            _surround_read(captured, node, tensors, rotations)
    captured.tidy()
    return stored, rotations


def _stored_tensors(captured: CapturedGraph, plan: CachePlan, changed: set[str]) -> list[StoredTensor]:
    placeholders = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    found = []
    for i, spec in enumerate(plan.caches):
        for part, dim, name in (("key", spec.key_dim, spec.key_format), ("value", spec.value_dim, spec.value_format)):
            if f"{part}_cache_{i}" not in changed:
                continue
            node, form = placeholders[f"{part}_cache_{i}"], find_format(name)
            shape = [*node.meta["val"].shape[:3], form.stored_width(dim)]
            with captured.fake_mode:
                node.meta["val"] = torch.empty(shape, dtype=form.dtype, device=node.meta["val"].device)
            block = 1
            if form.name in ROTATED:
                # Values that are the first dims of the keys are whole blocks of them.
                width = dim
                for read in (user for user in node.users if is_call(user, ops.latent_attention)):
                    width |= int(read.args[6])
                block = width & -width
            found.append(StoredTensor(node, form, spec.num_kv_heads, block))
    return found


def _surround_write(
    captured: CapturedGraph, write: Node, tensors: dict[Node, StoredTensor], rotations: list[RowRotation]
) -> None:
    rows = list(write.args)
    formats = {}
    with captured.graph.inserting_before(write):
        for i, part in enumerate(("key", "value")):
            tensor = tensors.get(write.args[i + 2])  # type: ignore[arg-type]
            if tensor is None:
                continue
            row = write.args[i]
            assert isinstance(row, Node)
            row = _rotate(captured, row, tensor, part, rotations)
            rows[i] = _scale_heads(captured, row, tensor, aten.div.Tensor)
            if tensor.name is not None:
                formats[f"{part}_format"] = tensor.name
    write.args = tuple(rows)
    write.kwargs = {**write.kwargs, **formats}


def _surround_read(
    captured: CapturedGraph, read: Node, tensors: dict[Node, StoredTensor], rotations: list[RowRotation]
) -> None:
    """Queries are turned and scaled as the keys are not, and the output back as the values were."""
    latent = is_call(read, ops.latent_attention)
    keys = tensors.get(read.args[1])  # type: ignore[arg-type]
    values = tensors.get(read.args[1 if latent else 2])  # type: ignore[arg-type]
    formats = {}
    if keys is not None:
        query = read.args[0]
        assert isinstance(query, Node)
        with captured.graph.inserting_before(read):
            query = _rotate(captured, query, keys, "query", rotations)
            query = _scale_heads(captured, query, keys, aten.mul.Tensor)
        read.args = (query, *read.args[1:])
        formats["format" if latent else "key_format"] = keys.name
    if values is not None:
        if not latent:
            formats["value_format"] = values.name
        with captured.graph.inserting_before(read.next):
            result = _rotate(captured, read, values, OUTPUT, rotations)
            result = _scale_heads(captured, result, values, aten.mul.Tensor)
        if result is not read:
            inside = _between(read, result)
            read.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    read.kwargs = {**read.kwargs, **{k: v for k, v in formats.items() if v is not None}}


def _between(first: Node, last: Node) -> set[Node]:
    """The nodes after ``first`` up to ``last``, in the order of the graph."""
    found, node = set(), first
    while node is not last:
        node = node.next
        found.add(node)
    return found


def _rotate(captured: CapturedGraph, rows: Node, tensor: StoredTensor, role: str, rotations: list[RowRotation]) -> Node:
    """Rows ``[T, H, D]`` times the block diagonal Hadamard matrix; storing and reading cancel each other."""
    block = tensor.block
    if block == 1:
        return rows
    power, way = block.bit_length() - 1, "read" if role in ("query", OUTPUT) else "store"
    turn = hadamard(block) * 2.0 ** -(power // 2 if way == "read" else power - power // 2)
    like = rows.meta["val"]
    matrix = _buffer(captured, f"_hadamard_{block}_{way}_{str(like.dtype)[6:]}", turn, rows)
    heads, width = int(like.shape[1]), int(like.shape[2])
    if width == block:
        nodes = [emit(captured, aten.matmul.default, rows, matrix, like=rows)]
    else:
        nodes = [emit(captured, aten.reshape.default, rows, [-1, heads, width // block, block], like=rows)]
        nodes.append(emit(captured, aten.matmul.default, nodes[-1], matrix, like=rows))
        nodes.append(emit(captured, aten.reshape.default, nodes[-1], [-1, heads, width], like=rows))
    rotations.append(RowRotation(tensor.placeholder.name, role, rows, tuple(nodes), matrix, turn))
    return nodes[-1]


def _scale_heads(captured: CapturedGraph, rows: Node, tensor: StoredTensor, op: Any) -> Node:
    """Rows ``[T, H, D]`` times, or divided by, the scale of the stored head that each of them belongs to."""
    if tensor.scale is None:
        return rows
    heads, width = (int(size) for size in rows.meta["val"].shape[1:])
    # Used as it is: what is computed of a buffer alone is folded, and would not follow the calibration.
    scale = _buffer(captured, tensor.scale, torch.ones(tensor.heads, 1, 1), rows)
    grouped = emit(captured, aten.reshape.default, rows, [-1, tensor.heads, heads // tensor.heads, width], like=rows)
    grouped = emit(captured, op, grouped, scale, like=rows)
    return emit(captured, aten.reshape.default, grouped, [-1, heads, width], like=rows)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two: entries 1 and -1, symmetric, its square ``size`` times the identity."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _buffer(captured: CapturedGraph, name: str, value: Tensor, like: Node) -> Node:
    """A node that reads the module's buffer of that name, made from ``value`` if it is not there yet."""
    sample = like.meta["val"]
    known = hasattr(captured.module, name)
    return hold(captured, name, None if known else value.to(sample.device, sample.dtype))
