"""A graph of Dynamo's as a module of token ids, with the model's own tensors under their own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from kvpass.adapters import LogitsModel
from kvpass.dynamo.calls import ModelCall

HELD = "held"  # submodule of a graph's model that has the tensors under their own names


class Input(Enum):
    """What an input of a graph is filled with."""

    TOKENS = "token ids [B, S]"
    MASK = "ones [B, S], or a causal mask [..., S, S]"
    POSITIONS = "positions [B, S]"
    BATCH = "B"
    LENGTH = "S"


@dataclass(frozen=True)
class GraphInputs:
    """What the placeholders of a graph are filled with.

    Attributes:
        order: for each placeholder what it is, or the dotted name of a tensor.
        tensors: by name.
    """

    order: Sequence[Input | str]
    tensors: Mapping[str, Tensor]


def roles_of(call: ModelCall) -> dict[str, Input]:
    """What the arguments of a call are that go with its tokens, by their names."""
    named = {call.tokens: Input.TOKENS, call.mask: Input.MASK, call.positions: Input.POSITIONS}
    return {name: role for name, role in named.items() if name is not None}


class GraphModel(nn.Module):
    """``forward(input_ids [B, S], position_ids [B, S] | None)`` gives one of the graph's outputs.

    Args:
        graph: torch-level.
        inputs: of it.
        call: says what masks and positions are.

    Attributes:
        output: which of the outputs.
    """

    def __init__(self, graph: GraphModule, inputs: GraphInputs, call: ModelCall) -> None:
        super().__init__()
        self.traced = graph
        self.inputs = list(inputs.order)
        self.output = 0
        self.call = call
        self.add_module(HELD, nn.Module())
        for name, tensor in inputs.tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self.get_submodule(HELD)
            for part in path:
                if not isinstance(owner._modules.get(part), nn.Module):
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor, persistent=False)
        self.eval()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The output, a tensor."""
        found = self.outputs(input_ids, position_ids)[self.output]
        assert isinstance(found, Tensor)
        return found

    def outputs(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Any, ...]:
        """All outputs."""
        return tuple(Interpreter(self.traced).run(*self.arguments(input_ids, position_ids)))

    def arguments(self, input_ids: Tensor, position_ids: Tensor | None = None) -> list[Any]:
        """What the graph is called with."""
        found = self.call.for_tokens(input_ids, position_ids)
        values: dict[Input, Any] = {Input.BATCH: input_ids.shape[0], Input.LENGTH: input_ids.shape[1]}
        values |= {role: found[name] for name, role in roles_of(self.call).items()}
        return [values[one] if isinstance(one, Input) else self._tensor(one) for one in self.inputs]

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        found = getattr(self.get_submodule(f"{HELD}.{path}" if path else HELD), leaf)
        assert isinstance(found, Tensor)
        return found


class GivenCall(LogitsModel):
    """The user's model, called as it was called in a scope, but for the tokens; it has the last word."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.copied = []
        self.path = None
        self.positions_name = call.positions
        self._call = call
        self.train(model.training)

    def call(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        """All that the model returns."""
        args, kwargs = self._call.bound(self._call.for_tokens(input_ids, position_ids))
        return self.model._call_impl(*args, **kwargs)  # not what model.compile() has put in the place of it
