"""A call of a model under way in a scope: what Dynamo is shown, and how the graph that it runs is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from kvpass.dynamo.absent import absent
from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.doorway import Doorway
from kvpass.dynamo.graph_engines import GraphEngine, engine_of_graph
from kvpass.dynamo.graph_model import Input, roles_of
from kvpass.dynamo.graph_site import GraphSite
from kvpass.errors import WeightsChangedError

PYTHON_VALUES = "it returns Python values, which may be others for a single row or token"
EXPLAIN = "torch._dynamo.explain(model)(ids)"


class StaticShape(Exception):
    """A graph was made for one batch size or one length."""

    def __init__(self, size: Input) -> None:
        super().__init__(f"the graph is made for one {size.name.lower()}")
        self.size = size


@dataclass(frozen=True)
class Reading:
    """What a graph takes and gives.

    Attributes:
        inputs: of each placeholder what it is filled with; None for a tensor of the model.
        outputs: a node for a tensor, a size of the token ids, or a constant.
        guards: what was taken for granted of batch size and length, in these symbols.
        is_open: whether more was, of these and of other numbers.
    """

    inputs: list[Input | None]
    outputs: list[Any]
    guards: tuple[sympy.Expr, ...]
    symbols: dict[str, Input]
    is_open: bool

    def holds(self, batch: int, length: int) -> bool:
        """Whether the graph is the forward for so many sequences of so many tokens."""
        sizes = {Input.BATCH: max(2, batch), Input.LENGTH: max(2, length)}  # one is shown as two
        for guard in self.guards:
            values = {symbol: sympy.Integer(sizes[self.symbols[str(symbol)]]) for symbol in guard.free_symbols}
            if guard.xreplace(values) == sympy.false:
                return False
        return True


class CallUnderWay:
    """One call.

    Dynamo is shown the call's own tokens, but with two rows and two tokens at least, for it would make another graph
    for a batch or a length of one.

    Attributes:
        is_asked: whether a graph has asked for its outputs.
        is_answered: whether the logits were computed.
        altered: the sizes that Dynamo is shown another number for.

    Args:
        doorway: of the model.
        call: of it.
        compute: the logits of the call, of an engine, in the shape that the graph gives them in.
        note: told of each graph that asks.
    """

    def __init__(
        self,
        doorway: Doorway,
        call: ModelCall,
        compute: Callable[[GraphEngine, ModelCall, Reading], Tensor],
        note: Callable[[GraphSite], object],
    ) -> None:
        self.is_asked = self.is_answered = False
        self._doorway = doorway
        self._call = call
        self._compute = compute
        self._note = note
        self._roles: dict[int, Input] = {}
        self._shown: dict[str, Tensor] = {}
        self._reading: Reading | None = None
        self.altered: set[Input] = set()

    def show(self, attempt: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that Dynamo is shown; other numbers for a single row or token in each attempt."""
        call, ids = self._call, self._call.ids
        more, longer = (2 + attempt - 1 if size == 1 else 0 for size in ids.shape)
        self.altered = {size for size, added in ((Input.BATCH, more), (Input.LENGTH, longer)) if added}
        ids = torch.cat((ids, ids[:1].expand(more, -1)))
        ids = torch.cat((ids, ids[:, :1].expand(-1, longer)), 1)
        self._shown = call.for_tokens(ids)
        roles = roles_of(call)
        for name, tensor in self._shown.items():
            for dim, meaning in enumerate(self._meanings(roles[name])):
                if meaning is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        self._roles = {id(tensor): roles[name] for name, tensor in self._shown.items()}
        return call.bound(self._shown)

    def _meanings(self, role: Input) -> tuple[Input | None, ...]:
        """What the sizes of an argument are; None for one that is always 1."""
        causal = self._call.causal
        if role is not Input.MASK or causal is None:
            return Input.BATCH, Input.LENGTH
        outer = (Input.BATCH if batched else None for batched in causal.batched)
        return (*outer, Input.LENGTH, Input.LENGTH)

    def answer(self, site: GraphSite, args: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a graph that runs on ``args``: the logits of the call, and what must not be used.

        Raises:
            LeftAlone: if the graph is not the whole model, or another model.
            StaticShape: if it was made for one shape.
            RefusedError: if no rewrite of it could be proven.
        """
        self.is_asked = True
        self._note(site)
        if self.is_answered or not site.frame.is_whole or site.frame.code is not self._doorway.code:
            raise LeftAlone(f"its forward becomes several graphs, as {EXPLAIN} shows")
        if site.frame.changes_state:
            raise LeftAlone("its forward changes Python objects that outlive it, as a counter or a list does")
        roles = tuple((place, role) for place, value in enumerate(args) if (role := self._roles.get(id(value))))
        reading = site.readings.get(roles)
        if reading is None:
            meanings = {place: self._meanings(role) for place, role in roles}
            reading = site.readings[roles] = read_graph(site, dict(roles), meanings)
        self._reading = reading
        inputs = [value if one is None else one for value, one in zip(args, reading.inputs, strict=True)]
        model, ids = self._doorway.model, self._call.ids
        found = engine_of_graph(model, self._call, site, inputs)
        with torch.no_grad():
            try:
                logits = self._compute(found, self._call, reading)
            except WeightsChangedError:
                found = engine_of_graph(model, self._call, site, inputs, stale=found)
                logits = self._compute(found, self._call, reading)
        self.is_answered = True
        sizes = {Input.BATCH: ids.shape[0], Input.LENGTH: ids.shape[1]}
        outputs = [
            absent() if isinstance(one, Node) else sizes[one] if isinstance(one, Input) else one
            for one in reading.outputs
        ]
        outputs[found.output] = logits
        return tuple(outputs)

    def own(self, outputs: Any) -> Any:
        """What the model returns, with the call's own arguments in the place of what Dynamo was shown.

        Raises:
            LeftAlone: if something may go by what it was shown.
        """
        assert self._reading is not None
        given = {id(tensor): self._call.arguments[name] for name, tensor in self._shown.items()}
        sizes = sum(isinstance(one, Input) for one in self._reading.outputs)
        leaves = pytree.tree_leaves(outputs)
        if self.altered and sum(type(leaf) is int for leaf in leaves) > sizes:
            raise LeftAlone(PYTHON_VALUES)

        def replaced(leaf: Any) -> Any:
            if id(leaf) in given:
                return given[id(leaf)]
            parts = [] if isinstance(leaf, Tensor) else list(getattr(leaf, "__dict__", {}).values())
            if any(id(part) in given for part in parts):
                raise LeftAlone(f"it returns its arguments within a {type(leaf).__name__}")
            if self.altered and any(isinstance(one, (bool, float, complex, str, Enum)) for one in (leaf, *parts)):
                raise LeftAlone(PYTHON_VALUES)
            if self.altered and any(isinstance(one, int) for one in parts):
                raise LeftAlone(PYTHON_VALUES)
            return leaf

        return pytree.tree_map(replaced, outputs)


def read_graph(site: GraphSite, roles: Mapping[int, Input], meanings: Mapping[int, Sequence[Input | None]]) -> Reading:
    """What the inputs and outputs of a graph are.

    Args:
        site: the graph.
        roles: of the inputs that come from the call, by place.
        meanings: of the sizes of each; None for one that is always 1.

    Raises:
        LeftAlone: if that cannot be told.
        StaticShape: if the graph was made for one shape.
    """
    symbols: dict[str, Input] = {}
    for place in roles:
        shape = site.placeholders[place].meta["example_value"].shape
        for meaning, size in zip(meanings[place], shape, strict=True):
            if meaning is None:
                continue
            if str(size).isdecimal() or symbols.get(str(size), meaning) is not meaning:
                raise StaticShape(meaning)
            symbols[str(size)] = meaning
    if Input.TOKENS not in roles.values():
        raise LeftAlone("its graph does not take the token ids that the model is called with")
    inputs: list[Input | None] = []
    for place, node in enumerate(site.placeholders):
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) and str(value) not in symbols:
            raise LeftAlone(f"its graph takes a number, {node.name}, and what it means for a cache is not known")
        inputs.append(roles.get(place) if isinstance(value, Tensor) else symbols[str(value)])
    (node,) = (node for node in site.graph.graph.nodes if node.op == "output")
    outputs: list[Any] = []
    for output in node.args[0]:
        value = output.meta.get("example_value") if isinstance(output, Node) else output
        if isinstance(value, torch.SymInt) and str(value) in symbols:
            outputs.append(symbols[str(value)])
        elif isinstance(output, Node) and not isinstance(value, Tensor):
            raise LeftAlone(f"its graph gives {value}, which is neither a tensor nor a size")
        else:
            outputs.append(output)
    names = set(symbols)
    free = [(guard, {str(symbol) for symbol in guard.free_symbols}) for guard in site.frame.shape_guards]
    guards = tuple(guard for guard, symbols_in in free if symbols_in <= names and not _is_of_few(guard))
    is_open = any(symbols_in & names and not symbols_in <= names for _, symbols_in in free)
    return Reading(inputs, outputs, guards, symbols, is_open)


def _is_of_few(guard: sympy.Expr) -> bool:
    """Whether a guard says no more than that there are two at least, which is what Dynamo is shown."""
    if len(guard.free_symbols) != 1:
        return False
    (symbol,) = guard.free_symbols
    few = {sympy.Ne(symbol, 0), sympy.Ne(symbol, 1), symbol > 1, symbol >= 2, symbol >= 0, symbol > 0, symbol >= 1}
    return guard in few or sympy.simplify(guard) in few
