"""The graph of a step in a dialect: a module that ``torch.export`` traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export
from torch.fx import Node
from torch.fx.node import map_arg

from kvpass.errors import RefusedError
from kvpass.exporters.dialects.contracts import Contract, Port
from kvpass.exporters.dialects.lowerings import Call, Step, find_lowering, op_name
from kvpass.fx_passes.capture.alone import alone
from kvpass.fx_passes.capture.quiet_export import quiet_export
from kvpass.fx_passes.graph import Role, arguments, role_of
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.report import RewriteReport
from kvpass.types import CachePlan, Refusal


@dataclass(frozen=True)
class _Unused:
    """What stands for an input of the graph that a contract does not have; only lowerings may see it."""


@dataclass(frozen=True)
class _Cache:
    """Stands for a cache; which tensors it is now, the step knows."""

    name: str


@dataclass
class LastStep:
    """What the lowerings of the step that was traced last have shared; torch.export leaves such an object alone."""

    shared: dict[str, Any] = field(default_factory=dict)


class ExportedStep(nn.Module):
    """A paged step as a function of a contract's inputs.

    Args:
        module: the rewritten model; its tensors are used as they are.
        dialect: in which ops of kvpass are said.
        contract: the inputs.
        gives_caches: whether the caches after the step are handed back beside the logits; else they were written.
    """

    def __init__(self, module: PagedModule, dialect: str, contract: Contract, gives_caches: bool) -> None:
        super().__init__()
        self.graph_module = module.graph_module
        self.plan, self.dialect, self.contract, self.gives_caches = module.plan, dialect, contract, gives_caches
        self.ports = contract.inputs(module.plan)
        self.last = LastStep()
        self.eval()

    def forward(self, *values: Tensor) -> Any:
        """Logits ``[R, V]``, and the caches in the order of the inputs where they are handed back."""
        first = next(place for place, port in enumerate(self.ports) if port.cache is not None)
        step = self.contract.step(self.plan, values[:first], values[first:])
        for port, value in zip(self.ports[first:], values[first:], strict=True):
            assert port.cache is not None
            step.caches[port.cache] = (*step.caches.get(port.cache, ()), value)
        # A caller who goes beyond what is proven gets numbers that no sampler takes for text.
        logits = self.contract.logits(torch.where(step.fits, self._run(step), torch.nan))
        self.last.shared = step.shared
        if not self.gives_caches:
            return logits
        return logits, *(tensor for held in step.caches.values() for tensor in held)

    def _run(self, step: Step) -> Tensor:
        given: dict[str, object] = {
            "positions": step.positions,
            "slot_mapping": step.slot_mapping,
            "block_tables": step.block_tables,
            "seq_lens": step.seq_lens,
            "query_start": step.query_start,
            "logits_index": step.logits_index,
        }
        env: dict[Node, Any] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._placeholder(node, step, given)
            elif node.op == "get_attr":
                env[node] = _attribute(self.graph_module, str(node.target))
            elif node.op == "output":
                (logits, *_) = map_arg(node.args[0], lambda n: env.get(n))
                result = logits[0] if isinstance(logits, tuple) else logits
                assert isinstance(result, Tensor)
                return result[0]
            else:
                env[node] = self._call(node, step, env)
        raise AssertionError("a graph has an output")

    def _placeholder(self, node: Node, step: Step, given: dict[str, object]) -> object:
        role = role_of(node)
        if role is Role.CACHE:
            return _Cache(node.name)
        if role is Role.TOKENS:
            return step.token_ids.unsqueeze(0)
        if node.name not in given:  # the model's own position ids, [1, T]
            assert role is Role.POSITIONS, f"{node.name} is an input that no contract has"
            return step.positions.unsqueeze(0)
        value = given[node.name]
        return _Unused() if value is None else value

    def _call(self, node: Node, step: Step, env: dict[Node, Any]) -> Any:
        name = op_name(node.target)
        if name is None:
            assert callable(node.target)
            args, options = map_arg((node.args, node.kwargs), lambda n: env[n])
            if any(isinstance(arg, _Unused) for arg in args):
                return _Unused()
            return node.target(*args, **options)
        named = map_arg(arguments(node), lambda n: env[n])
        caches = {part: value.name for part, value in named.items() if isinstance(value, _Cache)}
        values = {part: step.caches.get(cache) or _without_numbers(caches, step) for part, cache in caches.items()}
        lowering = find_lowering(name, self.dialect)
        assert lowering is not None and isinstance(node.target, OpOverload), f"{name} was not refused"
        return lowering.run(Call(name, node.target, {**named, **values}, caches, step))


def _without_numbers(caches: dict[str, str], step: Step) -> tuple[Tensor, ...]:
    """What stands for a cache of rows without numbers, which is no input: as many as the other cache has."""
    other = next(step.caches[cache][0] for cache in caches.values() if cache in step.caches)
    return (other.new_empty(*other.shape[:3], 0),)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def refusals(module: PagedModule, dialect: str) -> list[Refusal]:
    """What of a rewritten model a dialect cannot say: every op of kvpass, by the attention that it is of."""
    found = [Refusal(reason, pass_name="export") for reason in _plan_refusals(module.plan)]
    for node in module.graph_module.graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else None
        if name is None:
            continue
        lowering = find_lowering(name, dialect)
        cannot = f"the op {name}" if lowering is None else lowering.cannot(arguments(node))
        if cannot is not None:
            found.append(Refusal(cannot, node.name, str(node.meta.get("kvpass_site", "")), "export"))
    return found


def _plan_refusals(plan: CachePlan) -> list[str]:
    reasons = []
    if plan.prefix:
        reasons.append(f"a prefix of {plan.prefix} tokens that see one another")
    if plan.settles:
        reasons.append("a cache in k4v2, whose blocks are settled by the engine")
    if plan.states:
        reasons.append("recurrent states")
    return reasons


def refuse(found: Sequence[Refusal], format: str, others: Sequence[str]) -> RefusedError:
    """The error of a format that cannot say a model, which names those that can."""
    said = list(dict.fromkeys(refusal.reason for refusal in found))
    instead = f"; format {' or '.join(others)} can" if others else "; no format can yet"
    message = f"format {format} cannot express {', '.join(said)}{instead}. Nothing was written"
    return RefusedError(message, RewriteReport(refusals=tuple(found)))


def untranslated(format: str, error: Exception) -> RefusedError:
    """The error of a model that a translator gave up on."""
    reason = " ".join(str(error).split())[:600]
    message = f"the model could not be translated to format {format}, and nothing was written: {reason}"
    refusal = Refusal(f"{type(error).__name__}: {reason}", pass_name="export")
    return RefusedError(message, RewriteReport(refusals=(refusal,)))


@alone()
def export_step(step: ExportedStep) -> ExportedProgram:
    """Trace a step with all named sizes left open."""
    values, ports = step.contract.examples(step.plan), step.ports
    device = next((t.device for t in step.graph_module.parameters()), torch.device("cpu"))
    sizes = _sizes(ports, values)
    caches = [
        torch.zeros([sizes[s] if isinstance(s, str) else s for s in port.shape], dtype=port.dtype)
        for port in ports[len(values) :]
    ]
    dims = {name: Dim(name, min=1) for name in sizes}
    shapes = tuple({i: dims[s] for i, s in enumerate(port.shape) if isinstance(s, str)} for port in ports)
    with torch.no_grad(), quiet_export():
        given = tuple(t.to(device) for t in (*values, *caches))
        program = export(step, given, dynamic_shapes=(shapes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine have no business in a file
    return program


def _sizes(ports: Sequence[Port], values: Sequence[Tensor]) -> dict[str, int]:
    """An example of each named size; those of pools of blocks are larger than any number in the block tables."""
    found = {
        name: size
        for port, value in zip(ports, values, strict=False)
        for name, size in zip(port.shape, value.shape, strict=True)
        if isinstance(name, str)
    }
    named = {name for port in ports for name in port.shape if isinstance(name, str)}
    return found | {name: 17 for name in named - found.keys()}
