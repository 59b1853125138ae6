"""What a forward leaves behind: a scope shows it other tokens than it is called with, and runs it to verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.variables.base import VariableTracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode


def changes_python_state(traced: Any) -> bool:
    """Whether the function that Dynamo traces changes objects that were there before, or a hook of its does.

    Args:
        traced: Dynamo's translator.
    """
    effects = traced.output.side_effects
    for variable in list(effects.id_to_variable.values()):
        kind = type(variable.mutation_type).__name__
        if kind == "AttributeMutationExisting" and effects.has_pending_mutation(variable):
            if not _is_as_before(variable, effects.store_attr_mutations.get(variable, {})):
                return True
            continue
        if kind == "ValueMutationExisting" and variable.mutation_type.is_modified:
            return True
        within = [part.mutation_type for part in vars(variable).values() if isinstance(part, VariableTracker)]
        if variable.source is not None and any(getattr(mutation, "is_modified", False) for mutation in within):
            return True
    return False


def _is_as_before(variable: Any, stored: Mapping[str, Any]) -> bool:
    """Whether an object's attributes end as they began, as those of a context do that is left again."""
    return bool(stored) and all(
        new.is_python_constant()
        and hasattr(variable, "value")
        and getattr(variable.value, name, stored) == new.as_python_constant()
        for name, new in stored.items()
    )


class _Writes(TorchDispatchMode):
    """Whether an op writes to some memory, by whatever name."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False
        self._memory = {_memory(tensor) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and _memory(value) in self._memory:
                self.found = True
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def writes_to_tensors(graph: GraphModule, arguments: Sequence[Any]) -> bool:
    """Whether a graph changes tensors that it is given, tried without computing anything.

    Args:
        graph: of Dynamo's.
        arguments: for its inputs.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    shown = {id(one): mode.from_tensor(one, static_shapes=True) for one in arguments if isinstance(one, Tensor)}
    writes = _Writes(list(shown.values()))
    try:
        with mode, writes, torch.no_grad():
            Interpreter(graph).run(*(shown.get(id(one), one) for one in arguments))
    except Exception:  # sizes that follow from data; what was written before that counts
        return writes.found or _writes_in_place(graph)
    return writes.found


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
