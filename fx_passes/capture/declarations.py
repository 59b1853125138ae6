"""Declarations of ops that are not torch's, held against what the ops do on the tensors of the model at hand.

An op that was declared to keep rows apart is run with one row changed, with its rows moved on, and with fewer rows; one
that was declared to mean a function is run beside it. This is a check and no proof: the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from kvpass.errors import CaptureError
from kvpass.fx_passes.op_facts.declared import DECLARED, MEANINGS, DeclaredFacts
from kvpass.fx_passes.op_facts.facts import packet_of

# Largest difference of two results that are the same, over the largest magnitude.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass
class _Call:
    """One call of a declared op, with the tensors that it was given."""

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(packet_of(self.node.target))

    def named(self) -> dict[str, Any]:
        """All arguments by their names in the op's schema."""
        schema = self.node.target._schema  # type: ignore[union-attr]
        given = dict(zip((argument.name for argument in schema.arguments), self.args, strict=False))
        return {**given, **self.kwargs}

    def run(self, changed: Mapping[str, Tensor], function: Callable[..., Any] | None = None) -> list[Tensor]:
        """The results, as a list, of the op or of a function that takes its arguments in the same order."""
        named = {**self.named(), **changed}
        args = [named.pop(name) for name in list(self.named())[: len(self.args)]]
        target: Any = function or self.node.target
        result = target(*args, **named)
        return [result] if isinstance(result, Tensor) else [each for each in result if isinstance(each, Tensor)]


class _Recorder(Interpreter):
    """Runs an exported program, and keeps the calls of declared ops."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.module())
        self.calls: list[_Call] = []

    def run_node(self, node: Node) -> Any:
        if packet_of(node.target) in {*DECLARED, *MEANINGS}:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            self.calls.append(_Call(node, args, dict(kwargs)))
        return super().run_node(node)


def check_declarations(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Check every declared op that a program calls; gives their names.

    Raises:
        CaptureError: naming the op whose declaration does not hold, and the row that broke it.
    """
    declared = {packet_of(node.target) for node in program.graph.nodes} & {*DECLARED, *MEANINGS}
    if not declared:
        return ()
    recorder = _Recorder(program)
    with torch.no_grad():
        recorder.run(*inputs)
        for call in recorder.calls:
            try:
                fault = _fault(call)
            except CaptureError:
                raise
            except Exception as error:  # the op is the user's, and may raise anything
                what = f"the op raised {type(error).__name__}: {error}"
                raise CaptureError(f"the declaration of {call.name} could not be checked: {what}") from error
            if fault:
                raise CaptureError(f"the declaration of {call.name} does not hold: {fault}")
    return tuple(sorted(map(str, declared)))


def _fault(call: _Call) -> str:
    packet = packet_of(call.node.target)
    assert packet is not None
    if packet in MEANINGS:
        return _other_meaning(call, MEANINGS[packet])
    facts = DECLARED[packet]
    if facts.reference is not None:
        return _other_meaning(call, facts.reference)
    return next(_row_faults(call, facts), "")


def _other_meaning(call: _Call, function: Callable[..., Any]) -> str:
    """Where the op and the function differ, in words."""
    floats = {name: value for name, value in call.named().items() if isinstance(value, Tensor)}
    drawn = {name: _drawn(value) for name, value in floats.items() if value.is_floating_point()}
    wanted, got = call.run(drawn), call.run(drawn, function)
    if [(t.shape, t.dtype) for t in wanted] != [(t.shape, t.dtype) for t in got]:
        return f"it gives {_described(wanted)}, the function {_described(got)}"
    for a, b in zip(wanted, got, strict=True):
        row = _first_apart(a, b, (-1,))
        if row is not None:
            return f"op and function differ in row {row}"
    return ""


def _row_faults(call: _Call, facts: DeclaredFacts) -> Iterator[str]:
    """What shows that rows are not kept apart, or that a result depends on where its row stands, or on how many."""
    operands = {
        name: _drawn(value)
        for name, value in call.named().items()
        if name in (facts.tokens or ()) and isinstance(value, Tensor)
    }
    if not operands:
        yield "none of its operands that may carry tokens is a tensor"
        return
    name, operand = next(iter(operands.items()))
    kept = [d for d in range(operand.dim()) if d - operand.dim() not in facts.dims]
    before = call.run(operands)
    for result in before:
        if result.dim() != operand.dim() or any(result.shape[d] != operand.shape[d] for d in kept):
            yield f"for `{name}` {list(operand.shape)} it gives {list(result.shape)}: not the dims that it should keep"
            return
    for row in _rows(operand, kept):
        changed = {n: _with_row(value, row, kept) for n, value in operands.items() if value.shape == operand.shape}
        for a, b in zip(before, call.run({**operands, **changed}), strict=True):
            other = a.clone()
            other[_at(row, kept, a.dim())] = b[_at(row, kept, a.dim())]
            apart = _first_apart(other, b, facts.dims)
            if apart is not None:
                yield f"changing row {row} of `{name}` changed row {apart} of the result"
                return
    for d in kept:
        if operand.shape[d] > 1:
            moved = call.run({n: value.roll(1, d) for n, value in operands.items()})
            fewer = call.run({n: value.narrow(d, 0, value.shape[d] - 1) for n, value in operands.items()})
            for a, b, c in zip(before, moved, fewer, strict=True):
                apart = _first_apart(a.roll(1, d), b, facts.dims)
                if apart is not None:
                    yield f"with its rows moved on along dim {d} the result is another one in row {apart}"
                apart = _first_apart(a.narrow(d, 0, a.shape[d] - 1), c, facts.dims)
                if apart is not None:
                    yield f"with one row less along dim {d} the result is another one in row {apart}"


def _drawn(value: Tensor) -> Tensor:
    """Numbers of the size of the given ones, every row another; whole numbers in another order."""
    generator = torch.Generator(value.device).manual_seed(0)
    if not value.is_floating_point():
        return value.flatten()[torch.randperm(value.numel(), generator=generator, device=value.device)].view_as(value)
    noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
    return (value + noise * value.float().std().nan_to_num(1.0).clamp_min(0.1)).to(value.dtype)


def _rows(operand: Tensor, kept: list[int]) -> list[tuple[int, ...]]:
    """The first, a middle and the last row, by their places in the dims that are kept."""
    sizes = [operand.shape[d] for d in kept]
    return list(dict.fromkeys((tuple(0 for _ in sizes), tuple(s // 2 for s in sizes), tuple(s - 1 for s in sizes))))


def _at(row: tuple[int, ...], kept: list[int], rank: int) -> tuple[Any, ...]:
    places = dict(zip(kept, row, strict=True))
    return tuple(places.get(d, slice(None)) for d in range(rank))


def _with_row(value: Tensor, row: tuple[int, ...], kept: list[int]) -> Tensor:
    changed, place = value.clone(), _at(row, kept, value.dim())
    changed[place] = changed[place] * -3 + 1 if value.is_floating_point() else changed[place].flip(-1)
    return changed


def _first_apart(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """The first row in which two results differ; ``dims`` are not part of a row's place."""
    close = CLOSE.get(a.dtype, 0.0)
    scale = float(a.abs().max()) if a.numel() else 0.0
    apart = ~((a == b) | ((a.double() - b.double()).abs() <= close * scale))
    along = [d for d in dims if -d <= apart.dim()]
    places = (apart.any(along[0] if len(along) == 1 else tuple(along)) if along else apart).nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def _described(tensors: list[Tensor]) -> str:
    return ", ".join(f"{list(tensor.shape)} in {tensor.dtype}" for tensor in tensors)
