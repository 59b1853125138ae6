"""What a forward leaves behind: a scope shows it other tokens than it is called with, and runs it to verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def changes_python_state(traced: Any) -> bool:
    """Whether the function that Dynamo traces changes objects that were there before, or a hook of its does.

    Args:
        traced: Dynamo's translator.
    """
    effects = traced.output.side_effects
    for variable in list(effects.id_to_variable.values()):
        kind = type(variable.mutation_type).__name__
        if kind == "AttributeMutationExisting" and effects.has_pending_mutation(variable):
            return True
        if kind == "ValueMutationExisting" and variable.mutation_type.is_modified:
            return True
    return False


def writes_to_tensors(graph: GraphModule, arguments: Sequence[Any]) -> bool:
    """Whether a graph changes tensors that it is given, tried without computing anything.

    Args:
        graph: of Dynamo's.
        arguments: for its inputs.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    shown: dict[int, Tensor] = {}
    for one in arguments:
        if isinstance(one, Tensor):
            shown[id(one)] = mode.from_tensor(one, static_shapes=True)
    shown = {key: tensor for key, tensor in shown.items() if not tensor.is_inference()}  # which nobody may write to
    before = {key: tensor._version for key, tensor in shown.items()}
    try:
        with mode, torch.no_grad():
            Interpreter(graph).run(*(shown.get(id(one), one) for one in arguments))
    except Exception:  # sizes that follow from data; what was written before that counts
        return _any_written(shown, before) or _writes_in_place(graph)
    return _any_written(shown, before)


def _any_written(tensors: dict[int, Tensor], before: dict[int, int]) -> bool:
    return any(tensor._version != before[key] for key, tensor in tensors.items())


def _writes_in_place(graph: GraphModule) -> bool:
    """Whether any op in place is given an input itself."""
    for node in graph.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name in ("setitem", "iadd", "imul", "isub", "itruediv") or (
            name.endswith("_") and not name.endswith("__")
        )
        first = node.args[0] if node.args else None
        if node.op in ("call_function", "call_method") and in_place and getattr(first, "op", "") == "placeholder":
            return True
    return False
