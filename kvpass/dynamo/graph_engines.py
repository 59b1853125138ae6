"""The engine behind a graph of Dynamo's: one for each graph and the tensors it reads, kept with the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.adapters import LogitsModel, end_of_sequence, example_for, locate_logits
from kvpass.compiler import capture_model, check_model, rewrite
from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.effects import writes_to_tensors
from kvpass.dynamo.graph_model import HELD, GivenCall, GraphInputs, GraphModel, Input
from kvpass.dynamo.graph_site import GraphSite, is_foreign
from kvpass.dynamo.padding import Sides, check_padding
from kvpass.dynamo.saved import SavedGraph, key_of, load, save
from kvpass.engine.engine import Engine
from kvpass.engine.row_session import Row, RowSession, longest_row
from kvpass.errors import ConfigError, InputError, RefusedError
from kvpass.fx_passes.capture.alone import alone
from kvpass.fx_passes.graph import LogitsRows
from kvpass.outputs import Path, logits_at

PLACE = "_kvpass_graphs"  # attribute of a model
SHORT = 5  # tokens
MOST_ENGINES = 4  # of one model, for as many graphs
LEAST_BOUND = 1e-3  # of the largest logit


@dataclass(eq=False)
class GraphEngine:
    """An engine that gives a graph's logits.

    Attributes:
        engine: over the graph, rewritten.
        rows: which rows of logits the graph gives.
        output: which of its outputs they are.
        rank: dims of that output.
        path: of the logits in what the model returns.
        tensors: of the model, in the order of the graph's inputs, with their versions.
        padding: what was found of padding, by where it is and after how many changes of weights.
    """

    engine: Engine
    rows: LogitsRows
    output: int
    rank: int
    path: Path
    tensors: list[tuple[Tensor, int]]
    padding: dict[tuple[Sides, int], LeftAlone | None] = field(default_factory=dict)

    def check_padding(self, model: nn.Module, call: ModelCall, sides: Collection[Sides]) -> None:
        """Leave a call with padding alone, unless the model was found to take no notice of it.

        Raises:
            LeftAlone: if it does.
        """
        for side in sides:
            key = side, self.engine._weights.changes
            if key not in self.padding:
                self.padding[key] = None
                longest, vocab_size = longest_row(self.engine), self.engine.plan.vocab_size
                try:
                    check_padding(model, self.path, call, side, longest, vocab_size, self.bound)
                except LeftAlone as reason:
                    self.padding[key] = reason
            found = self.padding[key]
            if found is not None:
                raise found

    @property
    def bound(self) -> float:
        """How far logits may be from the model's, relative to the largest; of other texts formats may lose twice."""
        checked = self.engine.report.verification
        formats = 0.0 if checked is None else max(checked.tolerance, 2 * (checked.format_tolerance or 0.0))
        return max(LEAST_BOUND, formats)

    def try_short(self, model: nn.Module, call: ModelCall, session: RowSession, row: Row) -> None:
        """Compare short texts of one row with the model: what it reads for these alone nothing else would notice.

        Raises:
            LeftAlone: if it gives other logits.
        """
        for text in {row[:1], row[:SHORT]}:
            ids = torch.tensor([text], device=call.ids.device)
            args, kwargs = call.bound(call.for_tokens(ids))
            wanted = logits_at(model._call_impl(*args, **kwargs), self.path)
            wanted = wanted.reshape(-1, wanted.shape[-1])[-1].float()
            found = session.logits([text])[0].float()
            if not bool((found - wanted).abs().max() <= self.bound * wanted.abs().max()):
                raise LeftAlone(
                    "it is another function for a single row or token than when it was verified", lasting=False
                )

    def as_given(self, logits: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` in the shape that the graph gives them in."""
        if self.rows is LogitsRows.EVERY:
            return logits
        if self.rows is LogitsRows.MERGED:
            return logits.flatten(0, 1)
        return logits[:, -1:] if self.rank == 3 else logits[:, -1]

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the engine was made of these tensors, and those that it cannot watch are as they were."""
        known = self.tensors
        return len(known) == len(tensors) and all(
            one is tensor and (version < 0 or one._version == version)
            for one, (tensor, version) in zip(tensors, known, strict=True)
        )


@dataclass(eq=False)
class GraphEngines:
    """Those of one model, as an attribute of it, so that they go with it; a copy of the model has none.

    Attributes:
        found: by graph, configuration of the cache and form of the call: an engine, or why there is none.
    """

    found: dict[tuple[Any, ...], GraphEngine | RefusedError] = field(default_factory=dict)
    lock: Any = field(default_factory=RLock, repr=False)

    def close_idle(self, newest: GraphEngine) -> None:
        """Let go of the oldest engines that nobody uses, where there are many: each has a pool of its own."""
        made = [(key, found) for key, found in self.found.items() if isinstance(found, GraphEngine)]
        for key, found in made[: max(0, len(made) - MOST_ENGINES)]:
            if found is not newest and not found.engine._loop.requests:
                found.engine.close()
                del self.found[key]

    def __deepcopy__(self, memo: object) -> GraphEngines:
        return GraphEngines()

    def __reduce__(self) -> tuple[type[GraphEngines], tuple[()]]:
        return GraphEngines, ()


def engines_of(model: nn.Module) -> GraphEngines:
    """Those of a model."""
    found = model.__dict__.get(PLACE)
    if found is None:
        found = model.__dict__.setdefault(PLACE, GraphEngines())
    return found  # type: ignore[no-any-return]


def engine_of_graph(
    model: nn.Module,
    call: ModelCall,
    site: GraphSite,
    inputs: Sequence[Input | Tensor],
    stale: GraphEngine | None = None,
) -> GraphEngine:
    """The engine of a graph, made where there is none that can go on.

    Args:
        model: the user's, which the graph was traced of.
        call: how it was called.
        site: the graph.
        inputs: what each of its placeholders is.
        stale: one that cannot go on, since weights have changed.

    Raises:
        LeftAlone: if the graph does not give the model's logits.
        RefusedError: if it could not be proven; also VerificationError.
        InputError: if the model cannot be used as it is.
    """
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    engines, key = engines_of(model), (site.text, site.options.cache_key, call.form)
    with engines.lock:
        known = engines.found.get(key)
        if isinstance(known, RefusedError):
            raise known
        if known is not None:
            if known is not stale and known.reads(tensors):
                return known
            known.engine.close()
        try:
            made = _make(model, call, site, inputs)
        except RefusedError as error:
            engines.found[key] = error
            raise
        except (ConfigError, InputError) as error:
            raise LeftAlone(str(error)) from error
        engines.found.pop(key, None)
        engines.found[key] = made
        engines.close_idle(made)
        return made


@alone()
def _make(model: nn.Module, call: ModelCall, site: GraphSite, inputs: Sequence[Input | Tensor]) -> GraphEngine:
    device = check_model(model)
    names = {id(tensor): name for name, tensor in (*_named(model.named_parameters), *_named(model.named_buffers))}
    held: dict[str, Tensor] = {}
    filled: list[Input | str] = []
    for place, one in enumerate(inputs):
        if isinstance(one, Tensor):
            name = names.get(id(one), f"constant_{place}")
            held[name] = one
            filled.append(name)
        else:
            filled.append(one)
    is_portable = not any(map(is_foreign, site.graph.graph.nodes))
    key = key_of(model, call, site, held) if is_portable else ""
    saved = load(key, model, held)
    if saved is None:
        saved = _rewritten(model, call, site, GraphInputs(filled, held), device)
        if is_portable:
            save(key, saved, held)
    engine = Engine(saved.module, saved.module.plan, site.options.cache, saved.report, end_of_sequence(model))
    outside = [
        (one, -1 if id(one) in names or one.is_inference() else one._version)
        for one in inputs
        if isinstance(one, Tensor)
    ]
    node = next(node for node in site.graph.graph.nodes if node.op == "output").args[0][saved.output]
    return GraphEngine(engine, saved.rows, saved.output, node.meta["example_value"].dim(), saved.path, outside)


def _rewritten(
    model: nn.Module, call: ModelCall, site: GraphSite, inputs: GraphInputs, device: torch.device
) -> SavedGraph:
    """Prove, plan, lower and verify a graph."""
    call = call.apart()
    original = GivenCall(model, call)
    graph = GraphModel(site.graph, inputs, call)
    example = example_for(original, device)
    if writes_to_tensors(site.graph, graph.arguments(*example)):
        raise LeftAlone("its forward writes to tensors that outlive it: what it gives depends on the calls before")
    graph.output = _which_output(original, graph, device)
    captured = capture_model(LogitsModel(graph, call.positions is not None), device, HELD)
    rows = captured.rows
    module, report = rewrite(original, site.options.cache, device, captured=captured)
    return SavedGraph(module, report, rows, graph.output, original.path or (), captured.ledger, captured.path_prefix)


def _named(of: Any) -> list[tuple[str, Tensor]]:
    return list(of(remove_duplicate=False))


def _which_output(original: GivenCall, graph: GraphModel, device: torch.device) -> int:
    """Which of the graph's outputs are the logits that the model returns."""
    example = example_for(original, device)
    with torch.no_grad():
        locate_logits(original, example)
        logits = original(*example)
        outputs = graph.outputs(*example)
    for place, output in enumerate(outputs):
        alike = isinstance(output, Tensor) and output.shape == logits.shape and output.dtype == logits.dtype
        if alike and torch.allclose(output.float(), logits.float(), rtol=1e-3, atol=1e-4, equal_nan=True):
            return place
    raise LeftAlone("none of the outputs of its graph are the logits that the model returns")
