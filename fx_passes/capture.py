"""``capture``: a module becomes one ATen graph, batch and length symbolic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from kvpass.fx_passes.graph import CapturedGraph, LogitsRows, aten, expression
from kvpass.fx_passes.logits_rows import return_every_row, rows_returned
from kvpass.fx_passes.token_mixers import token_mixers

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 11  # a batch of 1 would pin the batch
LONGEST_TRIED = 4096  # longest sequence on which model and graph are compared


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
    return {overload: partial(overload._op_dk, composite) for overload in overloads if _is_composite(overload)}


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
    try:
        return _capture(model, inputs, path_prefix)
    except CaptureError as error:
        error.args = (f"{error}{token_mixers(model, inputs)}",)
        raise


def _capture(model: nn.Module, inputs: tuple[Tensor, ...], path_prefix: str) -> CapturedGraph:
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    start = time.perf_counter()
    try:
        with _plain_attention_modules():
            program = export(model, inputs, dynamic_shapes=(dims,) if _takes_varargs(model) else dims, strict=False)
            program = program.run_decompositions(_decompositions())
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"torch.export could not capture the model: {first}\n"
            "kvpass needs a forward without data-dependent Python control flow, and without tensors taken by .data; "
            "the original error is chained above."
        ) from error
    seconds = time.perf_counter() - start
    captured = _to_graph(program, path_prefix)
    captured.export_seconds = seconds
    captured.max_length = _longest_valid(captured, model)
    return captured


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
        paths = sorted(set(signature.buffers_to_mutate.values()))
        names = ", ".join(path.removeprefix(f"{path_prefix}.") for path in paths)
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
    captured = CapturedGraph(graph_module, *_symbols(inputs), *_named(inputs), path_prefix=path_prefix)
    return _with_every_row(captured)


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


def _longest_valid(captured: CapturedGraph, model: nn.Module) -> int | None:
    """The longest sequence for which the graph is the model's: Python branches on the length were taken one way.

    A condition that fails at one length alone is most often one of the capture's own (a slice that happens to be
    the whole tensor). It is no limit if model and graph agree at that length.

    Raises:
        CaptureError: if a branch was taken that shorter sequences, or other batch sizes, would not take.
    """
    shapes = captured.fake_mode.shape_env
    assert shapes is not None
    conditions = [g.expr for g in shapes.guards if g.expr.free_symbols <= {captured.batch, captured.length}]
    longest: int | None = None
    for condition in conditions:
        broken = next((n for n in _broken(condition, captured) if not _apart(condition, captured, model, n)), None)
        if broken is None:
            continue
        if broken <= EXAMPLE_LENGTH:
            raise CaptureError(
                f"the forward takes another branch depending on the size of its input: the captured graph demands "
                f"{condition}, which does not hold for a sequence of {broken} tokens"
            )
        longest = broken - 1 if longest is None else min(longest, broken - 1)
    return longest


def _apart(condition: sympy.Basic, captured: CapturedGraph, model: nn.Module, length: int) -> bool:
    """Whether a condition fails at this length and not at the next ones, and model and graph agree there."""
    alone = all(_holds(condition, captured, length + d) for d in (1, 2, 3))
    return alone and length <= LONGEST_TRIED and _agree(captured, model, length)


def _agree(captured: CapturedGraph, model: nn.Module, length: int) -> bool:
    """Whether model and graph give the same logits at one length."""
    device = captured.input_ids.meta["val"].device
    ids = (torch.arange(length, device=device) * 7 % 5 % 2).repeat(EXAMPLE_BATCH, 1)
    inputs = (ids,) if captured.position_ids is None else (ids, torch.arange(length, device=device).expand_as(ids))
    with torch.no_grad():
        try:
            wanted, got = model(*inputs), captured.module(*inputs)[0]
        except (RuntimeError, IndexError, ValueError):
            return False
    got = (got[:, -1:] if captured.rows is LogitsRows.LAST else got).reshape(wanted.shape)
    scale = max(float(wanted.abs().max()), 1e-6)
    return bool((wanted - got).abs().max() <= 1e-3 * scale)


def _broken(condition: sympy.Basic, captured: CapturedGraph) -> Iterator[int]:
    """The lengths, of those worth trying, at which a condition fails for a batch of 2 or 3, shortest first.

    Conditions are comparisons with numbers: they are tried at all short lengths and around every number in them.
    """
    numbers = {int(n) for n in condition.atoms(sympy.Integer) if 0 < n < 2**31}
    tried = set(range(2, 65)) | {n + d for n in numbers for d in (-1, 0, 1, 2)} | {2 * n + 1 for n in numbers}
    for length in sorted(n for n in tried if n >= 2):
        if not all(_holds(condition, captured, length, batch) for batch in (2, 3)):
            yield length


def _holds(condition: sympy.Basic, captured: CapturedGraph, length: int, batch: int = 2) -> bool:
    return bool(condition.subs({captured.batch: batch, captured.length: length}) != sympy.false)


def _with_every_row(captured: CapturedGraph) -> CapturedGraph:
    rows = rows_returned(captured)
    if rows is None or not return_every_row(captured, rows):
        raise CaptureError(
            f"the model returns a tensor of shape {list(captured.output.meta['val'].shape)} for token ids of shape "
            "[batch, length]; kvpass needs logits [batch, length, vocabulary] for every token, or those of the last "
            "token, picked by x[:, -1], x[:, -1:] or x[:, [-1]] behind all attentions"
        )
    captured.rows = rows
    return captured
