"""``capture``: a module becomes one ATen graph, batch and length symbolic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from kvpass.errors import CaptureError
from kvpass.fx_passes.graph import CapturedGraph, aten, expression

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 11  # a batch of 1 would pin the batch


def _decompose_einsum(equation: str, tensors: list[Tensor], path: list[int] | None = None) -> Any:
    return aten.einsum.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, equation, tensors, path=path)


# Only what has no rule of its own is taken apart: the default table would destroy scaled_dot_product_attention.
DECOMPOSITIONS = {aten.einsum.default: _decompose_einsum}


def capture(model: nn.Module, inputs: tuple[Tensor, ...], path_prefix: str = "") -> CapturedGraph:
    """Capture ``model(*inputs)`` for every batch size and length.

    Args:
        model: a module whose forward takes token ids int64 ``[batch, length]``, and position ids of that shape when
            two inputs are given, and returns logits ``[batch, length, V]``. It must be in eval mode.
        inputs: example inputs; sizes other than 0 and 1, batch and length different.
        path_prefix: where ``model`` holds the user's module, to be left out of reports.

    Returns:
        the graph; its tensors are those of ``model``.

    Raises:
        CaptureError: if torch.export fails, or if the graph holds for the example's batch size or length only.
    """
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    try:
        with _plain_attention_modules():
            program = export(model, inputs, dynamic_shapes=(dims,) if _takes_varargs(model) else dims, strict=False)
            program = program.run_decompositions(DECOMPOSITIONS)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"torch.export could not capture the model: {first}\n"
            "kvpass needs a forward without data-dependent Python control flow; the original error is chained above."
        ) from error
    return _to_graph(program, path_prefix)


@contextmanager
def _plain_attention_modules() -> Iterator[None]:
    """Keep nn.MultiheadAttention from its fused fast path, one opaque op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _takes_varargs(model: nn.Module) -> bool:
    return bool(model.forward.__code__.co_flags & 0x04) if hasattr(model.forward, "__code__") else False


def _to_graph(program: ExportedProgram, path_prefix: str) -> CapturedGraph:
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(set(signature.buffers_to_mutate.values())))
        raise CaptureError(f"the forward writes to the buffers {names}: a paged step cannot reproduce such state")
    if signature.user_inputs_to_mutate:
        raise CaptureError("the forward changes its input tensors in place")
    module, attributes = _hold_tensors(program)
    graph = Graph()
    renamed: dict[Node, Node] = {}
    inputs: list[Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in attributes:
            copy = graph.get_attr(attributes[node.name])
            copy.meta = dict(node.meta)
        else:
            copy = graph.node_copy(node, lambda n: renamed[n])
            if node.op == "placeholder":
                inputs.append(copy)
        renamed[node] = copy
    for name, child in program.graph_module.named_children():
        module.add_module(name, child)
    graph_module = GraphModule(module, graph)
    return _check_shapes(
        program, CapturedGraph(graph_module, *_symbols(inputs), *_named(inputs), path_prefix=path_prefix)
    )


def _hold_tensors(program: ExportedProgram) -> tuple[nn.Module, dict[str, str]]:
    """A module that holds the very tensors of the model, and the attribute path of each lifted placeholder."""
    root = nn.Module()
    attributes: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            continue
        assert spec.target is not None
        tensor = program.state_dict.get(spec.target)
        if tensor is None:
            tensor = program.constants[spec.target]
        *path, leaf = spec.target.split(".")
        owner = root
        for part in path:
            if not isinstance(getattr(owner, part, None), nn.Module):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=False)
        attributes[spec.arg.name] = spec.target
    return root, attributes


def _symbols(inputs: list[Node]) -> tuple[sympy.Symbol, sympy.Symbol]:
    shape = inputs[0].meta["val"].shape
    for name, size in zip(("batch size", "length"), shape, strict=True):
        if not isinstance(expression(size), sympy.Symbol):
            raise CaptureError(
                f"the captured graph holds for one {name} only ({size}): somewhere the forward turns the {name} into "
                "a constant, for example with int(x.shape[i]) or a buffer made for one size"
            )
    return expression(shape[0]), expression(shape[1])


def _named(inputs: list[Node]) -> tuple[Node, Node | None]:
    return inputs[0], inputs[1] if len(inputs) > 1 else None


def _check_shapes(program: ExportedProgram, captured: CapturedGraph) -> CapturedGraph:
    bounds = program.range_constraints.get(captured.length)
    if bounds is not None and bounds.upper.is_number and bounds.upper.is_finite and bounds.upper < 2**31:
        captured.max_length = int(bounds.upper)
    if bounds is not None and bounds.lower > EXAMPLE_LENGTH - 1:
        raise CaptureError(f"the captured graph holds for lengths of at least {bounds.lower} only")
    logits = captured.output.meta["val"]
    shape = tuple(expression(s) for s in logits.shape)
    if len(shape) != 3 or shape[:2] != (captured.batch, captured.length):
        raise CaptureError(
            f"the model returns a tensor of shape {list(logits.shape)} for token ids of shape [batch, length]; "
            "kvpass needs logits [batch, length, vocabulary] for every token"
        )
    return captured
