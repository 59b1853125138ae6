"""A call of a model under way in a scope: what Dynamo is shown, and how the graph that it runs is answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.external_utils import wrap_inline
from torch.fx import Node

from kvpass.dynamo.absent import absent
from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.graph_engines import GraphEngine, engine_of_graph
from kvpass.dynamo.graph_model import Input
from kvpass.dynamo.graph_site import GraphSite

EXPLAIN = "torch._dynamo.explain(model)(ids)"
INLINED = wrap_inline(lambda: None).__code__


class StaticShape(Exception):
    """A graph was made for the very shape of its tokens; another shape has Dynamo make one for all."""


class CallUnderWay:
    """One call.

    Dynamo is shown the call's own tokens, but with two rows and two tokens at least, for it would make another graph
    for a batch or a length of one.

    Attributes:
        is_answered: whether the logits were computed.

    Args:
        model: the user's.
        call: of it.
        compute: the logits of the call, of an engine, in the shape that the graph gives them in.
        note: told of each graph that asks.
    """

    def __init__(
        self,
        model: nn.Module,
        call: ModelCall,
        compute: Callable[[GraphEngine, ModelCall], Tensor],
        note: Callable[[GraphSite], object],
    ) -> None:
        self.is_answered = False
        self._model = model
        self._call = call
        self._compute = compute
        self._note = note
        self._roles: dict[int, Input] = {}
        self._shown: dict[str, Tensor] = {}

    def show(self, attempt: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that Dynamo is shown; of another shape in each attempt."""
        call, ids = self._call, self._call.ids
        more = max(0, 2 + attempt - len(ids)) or attempt
        longer = max(0, 2 + attempt - ids.shape[1]) or attempt
        if len(ids) + more == ids.shape[1] + longer:  # equal sizes would be taken for one
            more += 1
        ids = torch.cat((ids, ids[:1].expand(more, -1)))
        ids = torch.cat((ids, ids[:, :1].expand(-1, longer)), 1)
        self._shown = call.for_tokens(ids)
        for tensor in self._shown.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        named = {call.tokens: Input.TOKENS, call.mask: Input.MASK, call.positions: Input.POSITIONS}
        self._roles = {id(tensor): named[name] for name, tensor in self._shown.items()}
        return call.bound(self._shown)

    def answer(self, site: GraphSite, args: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a graph that runs on ``args``: the logits of the call, and what must not be used.

        Raises:
            LeftAlone: if the graph is not the whole model, or another model.
            StaticShape: if it was made for one shape.
            RefusedError: if no rewrite of it could be proven.
        """
        self._note(site)
        if self.is_answered or not site.frame.is_whole:
            raise LeftAlone(f"its forward becomes several graphs, as {EXPLAIN} shows")
        if site.frame.code not in self._own_code():
            raise LeftAlone(f"torch.compile traces parts of its forward alone, as {EXPLAIN} shows")
        inputs = self._inputs(site, args)
        found = engine_of_graph(self._model, self._call, site, inputs, site.options.cache)
        symbols = self._symbols(site)
        outputs = [self._size(one, symbols) for one in _outputs(site)]
        with torch.no_grad():
            outputs[found.output] = self._compute(found, self._call)
        self.is_answered = True
        return tuple(outputs)

    def _own_code(self) -> tuple[Any, ...]:
        """The functions that are the whole model; hooks of the model's own are no part of its forward."""
        model = self._model
        hooks = (model._forward_hooks, model._forward_pre_hooks)
        forward = getattr(model.forward, "__code__", None)
        return (INLINED,) if any(hooks) or forward is None else (INLINED, forward)

    def _inputs(self, site: GraphSite, args: Sequence[Any]) -> list[Input | Tensor]:
        """What each input of a graph is."""
        symbols, inputs = self._symbols(site, args), []
        for node, value in zip(site.placeholders, args, strict=True):
            if isinstance(value, Tensor):
                inputs.append(self._roles.get(id(value), value))
            elif str(node.meta.get("example_value")) in symbols:
                inputs.append(symbols[str(node.meta["example_value"])])
            else:
                raise LeftAlone(f"its graph takes the number {value!r}, and what it means for a cache is not known")
        if Input.TOKENS not in inputs:
            raise LeftAlone("its graph does not take the token ids that the model is called with")
        return inputs

    def _symbols(self, site: GraphSite, args: Sequence[Any] = ()) -> dict[str, Input]:
        """What the symbols of a graph's sizes mean."""
        if args:
            self._places = [place for place, value in enumerate(args) if id(value) in self._roles]
        found: dict[str, Input] = {}
        for place in self._places:
            shape = site.placeholders[place].meta["example_value"].shape
            for meaning, size in zip((Input.BATCH, Input.LENGTH), shape, strict=True):
                if not isinstance(size, torch.SymInt) or found.get(str(size), meaning) is not meaning:
                    raise StaticShape
                found[str(size)] = meaning
        return found

    def _size(self, output: Any, symbols: dict[str, Input]) -> Any:
        """What is handed out in the place of an output that are no logits."""
        value = output.meta.get("example_value") if isinstance(output, Node) else output
        if isinstance(value, Tensor):
            return absent()
        meaning = symbols.get(str(value))
        if isinstance(value, torch.SymInt) and meaning is not None:
            return self._call.ids.shape[0 if meaning is Input.BATCH else 1]
        if isinstance(output, Node):
            raise LeftAlone(f"its graph gives {value}, which is neither a tensor nor a size")
        return output


def _outputs(site: GraphSite) -> list[Any]:
    (node,) = (node for node in site.graph.graph.nodes if node.op == "output")
    return list(node.args[0])
