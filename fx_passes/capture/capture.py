"""``capture``: a module becomes one ATen graph, batch and length symbolic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from kvpass.errors import CaptureError
from kvpass.fx_passes.capture.alone import alone, plain_attention_modules
from kvpass.fx_passes.capture.declarations import check_declarations
from kvpass.fx_passes.capture.diagnose_capture import token_mixers
from kvpass.fx_passes.capture.explain_failure import why_not_captured
from kvpass.fx_passes.capture.length_as_text import lengths_that_are_no_text
from kvpass.fx_passes.capture.length_conditions import longest_valid
from kvpass.fx_passes.capture.logits_rows import return_every_row, rows_returned
from kvpass.fx_passes.capture.quiet_export import quiet_export
from kvpass.fx_passes.capture.squeezed_dims import name_squeezed_dims
from kvpass.fx_passes.graph import ROLE, CapturedGraph, Role, aten, expression, read_attribute
from kvpass.fx_passes.op_facts.declared import MEANINGS
from kvpass.fx_passes.value_ledger import ValueLedger

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 11  # a batch of 1 would pin the batch


# Only composites and aliases without a rule of their own are taken apart: the default table would destroy
# scaled_dot_product_attention.
COMPOSITES = (
    "einsum", "tensordot", "inner", "ger", "kron", "bilinear", "chain_matmul", "linalg_matmul", "linalg_multi_dot",
    "linalg_vecdot", "linalg_norm", "frobenius_norm", "cosine_similarity", "pairwise_distance", "nanmean", "square",
    "concat", "concatenate", "hstack", "vstack", "dstack", "row_stack", "column_stack", "tile", "atleast_1d",
    "atleast_2d", "atleast_3d", "meshgrid", "broadcast_tensors", "take_along_dim", "fliplr", "flipud",
    "multiply", "divide", "subtract", "negative", "absolute", "clip", "greater", "greater_equal", "less", "less_equal",
    "not_equal", "float_power", "fix", "arctan2", "isfinite", "isclose", "relu6", "selu", "log_sigmoid",
    "special_softmax", "special_log_softmax", "special_logsumexp", "special_expit", "special_exp2", "special_expm1",
    "special_log1p", "special_erf", "special_xlogy",
)  # fmt: skip


def _decompositions() -> dict[OpOverload, Callable[..., Any]]:
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    packets = [getattr(aten, name) for name in COMPOSITES if hasattr(aten, name)]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    taken_apart = {overload: partial(overload._op_dk, composite) for overload in overloads if _is_composite(overload)}
    declared = {getattr(packet, name): meaning for packet, meaning in MEANINGS.items() for name in packet.overloads()}
    return taken_apart | declared


def _is_composite(overload: OpOverload) -> bool:
    try:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key))
    except RuntimeError:  # an overload of TorchScript alone
        return False


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
    with alone():
        try:
            return _capture(model, inputs, path_prefix)
        except CaptureError as error:
            error.args = (f"{error}{token_mixers(model, inputs)}",)
            raise
        except Exception as error:  # fail closed: a graph that cannot be read is none
            raise CaptureError(
                f"the captured graph could not be read, which is a defect of kvpass worth a report: "
                f"{type(error).__name__}: {error}"
            ) from error


def _capture(model: nn.Module, inputs: tuple[Tensor, ...], path_prefix: str) -> CapturedGraph:
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    start = time.perf_counter()
    try:
        with plain_attention_modules(), lengths_that_are_no_text(), quiet_export():
            program = export(model, inputs, dynamic_shapes=(dims,) if _takes_varargs(model) else dims, strict=False)
            declared = check_declarations(program, inputs)
            program = program.run_decompositions(_decompositions())
    except CaptureError:
        raise
    except Exception as error:
        reason = why_not_captured(error, model, inputs)
        raise CaptureError(f"torch.export could not capture the model: {reason}") from error
    seconds = time.perf_counter() - start
    captured = _to_graph(program, path_prefix)
    captured.export_seconds = seconds
    captured.declared = declared
    captured.max_length = longest_valid(captured, model, EXAMPLE_LENGTH)
    return captured


def _takes_varargs(model: nn.Module) -> bool:
    return bool(model.forward.__code__.co_flags & 0x04) if hasattr(model.forward, "__code__") else False


def _to_graph(program: ExportedProgram, path_prefix: str) -> CapturedGraph:
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(_paths(signature.buffers_to_mutate, path_prefix))
        raise CaptureError(f"the forward writes to the buffers {names}: a paged step cannot reproduce such state")
    parameters = getattr(signature, "parameters_to_mutate", {})  # not in every PyTorch
    if parameters:
        names = ", ".join(_paths(parameters, path_prefix))
        raise CaptureError(f"the forward writes to the parameters {names}: a paged step cannot reproduce such state")
    if signature.user_inputs_to_mutate:
        raise CaptureError("the forward changes its input tensors in place")
    objects = [spec.arg.name for spec in signature.input_specs if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN)]
    if objects:
        named = ", ".join(objects)
        raise CaptureError(
            f"the forward uses objects that are no tensors ({named}), such as a generator of random numbers"
        )
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
    held = {name: read_attribute(graph_module, name) for name in attributes.values()}
    roles, ledger = _with_roles(inputs), ValueLedger(held)
    captured = CapturedGraph(graph_module, *_symbols(inputs), roles, path_prefix=path_prefix, ledger=ledger)
    return _with_every_row(captured)


def _paths(mutated: Mapping[str, str], path_prefix: str) -> list[str]:
    return [path.removeprefix(f"{path_prefix}.") for path in sorted(set(mutated.values()))]


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


def _with_roles(inputs: list[Node]) -> dict[Role, Node]:
    """Token ids, and position ids where there is a second input."""
    roles = dict(zip((Role.TOKENS, Role.POSITIONS), inputs, strict=False))
    for role, node in roles.items():
        node.meta[ROLE] = role
    return roles


def _with_every_row(captured: CapturedGraph) -> CapturedGraph:
    name_squeezed_dims(captured)
    rows = rows_returned(captured)
    if rows is None or not return_every_row(captured, rows):
        raise CaptureError(
            f"the model returns a tensor of shape {list(captured.output.meta['val'].shape)} for token ids of shape "
            "[batch, length]; kvpass needs logits [batch, length, vocabulary] for every token, or those of the last "
            "token, picked by x[:, -1], x[:, -1:] or x[:, [-1]] behind all attentions"
        )
    captured.rows = rows
    return captured
