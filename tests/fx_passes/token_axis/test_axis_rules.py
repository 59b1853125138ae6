"""Every op rule is held against what the op does: perturb one token, and see whose results move.

The rules are not trusted here. A result that they accept must not change for any other token, at another length or in
another batch; a result that they refuse must change somewhere, or stand in `CONSERVATIVE` with the reason.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.capture import capture
from kvpass.fx_passes.op_facts.facts import packet_of
from kvpass.fx_passes.op_facts.table import FACTS
from kvpass.fx_passes.token_axis.axes import Axes, Kind, Mixed
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.infer_axes import Several
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from tests.fx_passes.op_cases import ACCEPTED, REFUSED
from tests.fx_passes.tracing import VOCAB, Cases, captured, outputs, show

BATCH, LENGTH = 3, 8
HIT = (1, 4)  # sequence and token that are perturbed
SAME = 1e-9  # results are float64

# Refused although no token reaches another: the rules see less than is there.
CONSERVATIVE = {
    "twice the sequence": "two copies of the sequence are added, token to the same token",
    "causal attention to constants": "the place among the queries is the position, until the graph is one step's",
}

# Ops of the table that torch.export takes apart before a pass could see them, or that another test covers.
NOT_SEEN = {
    **dict.fromkeys(
        (
            "batch_norm", "chunk", "convolution", "flatten", "narrow", "nonzero_numpy", "tensor_split", "unflatten",
        ),
        "export writes it with other ops",
    ),
    "kvpass.dense_attention": "made by find-attention; proven in test_find_attention",
}  # fmt: skip


@dataclass
class Traced:
    """Labels and results of a table of cases."""

    labels: dict[str, Axes | Mixed | Several]
    names: set[str]
    module: torch.nn.Module

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return dict(zip(self.labels, self.module(ids)[1:], strict=True))


def traced(table: dict[str, tuple]) -> Traced:
    graph = captured(Cases({name: case[0] for name, case in table.items()}))
    names = {str(packet_of(n.target)) for n in graph.graph.nodes if n.op == "call_function"}
    Canonicalize().apply(graph)
    names |= {str(packet_of(n.target)) for n in graph.graph.nodes if n.op == "call_function"}
    results = token_axes(graph).results
    return Traced(dict(zip(table, (results[n] for n in outputs(graph)[1:]), strict=True)), names, graph.module)


@pytest.fixture(scope="module")
def accepted() -> Traced:
    return traced(ACCEPTED)


@pytest.fixture(scope="module")
def refused() -> Traced:
    """The cases' own conditions on the length are set aside: here the rules have to see what depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "longest_valid", lambda graph, model, example_length: None)
        return traced(REFUSED)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def perturbed(ids: Tensor, hit: tuple[int, int] = HIT) -> Tensor:
    other = ids.clone()
    other[hit] = (other[hit] + 7) % VOCAB
    return other


def rows(value: Tensor, axes: Axes, batch: int, length: int) -> Tensor:
    """The entries of each token, `[B, S, entries]`, wherever the axes say that batch and tokens are."""
    sizes = {Kind.BATCH: batch, Kind.TOKEN: length}
    atoms = [f for dim in axes for f in dim]
    split = value.reshape([sizes.get(f.kind) or int(f.size) for f in atoms])
    kinds = [f.kind for f in atoms]
    for kind, size in ((Kind.TOKEN, length), (Kind.BATCH, batch)):
        if kind in kinds:
            split = split.movedim(kinds.index(kind), 0)
            kinds.insert(0, kinds.pop(kinds.index(kind)))
        else:
            split = split.expand(size, *split.shape)
            kinds.insert(0, kind)
    return split.reshape(batch, length, -1).to(torch.float64)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_the_right_axes(accepted: Traced, name: str) -> None:
    label = accepted.labels[name]
    assert not isinstance(label, Mixed), f"{label.node}: {label.reason}"
    assert isinstance(label, tuple) and show(label) == ACCEPTED[name][1]


def test_what_is_accepted_keeps_tokens_apart(accepted: Traced, ids: Tensor) -> None:
    before, after = accepted.run(ids), accepted.run(perturbed(ids))
    others = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    others[HIT] = False
    leaks = []
    for name, axes in accepted.labels.items():
        moved = (rows(before[name], axes, BATCH, LENGTH) - rows(after[name], axes, BATCH, LENGTH)).abs().amax(-1)
        if moved[others].max() > SAME:
            leaks.append(name)
    assert leaks == []


def test_what_is_accepted_does_not_depend_on_the_length_or_the_batch(accepted: Traced, ids: Tensor) -> None:
    whole, part = accepted.run(ids), accepted.run(ids[1:, : LENGTH - 3])
    differing = []
    for name, axes in accepted.labels.items():
        wanted = rows(whole[name], axes, BATCH, LENGTH)[1:, : LENGTH - 3]
        if (rows(part[name], axes, BATCH - 1, LENGTH - 3) - wanted).abs().max() > SAME:
            differing.append(name)
    assert differing == []


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(refused: Traced, name: str) -> None:
    label = refused.labels[name]
    assert isinstance(label, Mixed), f"accepted as {show(label)}"
    assert REFUSED[name][1] in label.reason


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_deserves_it(refused: Traced, ids: Tensor, name: str) -> None:
    """A token reaches another, or the value depends on the length, on the batch, or on chance."""
    before = refused.run(ids)[name]
    reaches = False
    for hit in range(LENGTH):
        changed = (before - refused.run(perturbed(ids, (1, hit)))[name]).flatten(2).abs().amax(-1) > SAME
        changed[1, hit] = False
        reaches = reaches or bool(changed.any())
    shorter, fewer = refused.run(ids[:, : LENGTH - 3])[name], refused.run(ids[1:])[name]
    by_length = (before[:, : LENGTH - 3] - shorter).abs().max() > SAME
    by_batch = (before[1:] - fewer).abs().max() > SAME
    by_chance = name == "random numbers"
    assert bool(reaches or by_length or by_batch or by_chance) != (name in CONSERVATIVE)


def test_every_op_with_a_rule_has_a_case(accepted: Traced, refused: Traced) -> None:
    seen = accepted.names | refused.names
    known = {str(op) for op, facts in FACTS.items() if facts.axes and facts.axes != "pointwise" and not facts.fresh}
    missing = {name.removeprefix("aten.") for name in known - seen}
    assert missing == set(NOT_SEEN), "add a case to op_cases.py for a new row"


def test_every_rule_is_named_by_an_op_and_every_name_is_a_rule() -> None:
    assert {facts.axes for facts in FACTS.values() if facts.axes} == set(AXIS_RULES) - {"declared_rows"}


def test_operands_are_named_as_the_schemas_name_them() -> None:
    for op, facts in FACTS.items():
        names = {a.name for overload in op.overloads() for a in getattr(op, overload)._schema.arguments}
        assert set(facts.tokens or ()) & names or not facts.tokens, op


@pytest.mark.parametrize("op", [op for op, f in FACTS.items() if f.axes == "pointwise"], ids=str)
def test_what_is_called_pointwise_is(op: OpOverloadPacket) -> None:
    """Each entry of a result moves with the entries at its place alone, for every overload that takes tensors."""
    tried = 0
    for overload in (getattr(op, name) for name in op.overloads()):
        arguments = example_arguments(overload)
        tensors = [i for i, value in enumerate(arguments or ()) if isinstance(value, Tensor)]
        try:
            before = overload(*arguments)
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        for place in tensors:
            changed = list(arguments)
            changed[place] = changed[place].clone()
            changed[place][1, 2] = 1 if changed[place].dtype == torch.bool else changed[place][1, 2] + 1
            after = overload(*changed)
            moved = (after != before) & ~(after.isnan() & before.isnan())
            moved[1, 2] = False
            assert moved.shape == (3, 4) and not moved.any(), f"{overload}: operand {place}"
            tried += 1
    assert tried, f"{op} could not be tried"


def example_arguments(overload: OpOverload) -> list[Any] | None:
    """Small tensors, numbers and defaults for a functional overload; None where it takes something else."""
    schema = overload._schema
    if schema.is_mutable or len(schema.returns) != 1:
        return None
    whole = any(word in schema.name for word in ("bitwise", "gcd", "lcm", "shift", "__and__", "__or__", "__xor__"))
    logical, complex_parts = "logical" in schema.name, any(w in schema.name for w in ("complex", "polar"))
    generator, given = torch.Generator().manual_seed(3), []
    for argument in schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            continue
        if kind in ("Tensor", "Optional[Tensor]"):
            values = torch.rand(3, 4, generator=generator, dtype=torch.float32 if complex_parts else torch.float64)
            values = values * 0.4 + 0.3
            values = torch.complex(values, values) if "imag" in schema.name else values
            truth = logical or argument.name == "mask"
            given.append((values * 9).long() + 1 if whole else values > 0.5 if truth else values)
        elif argument.has_default_value():
            given.append(argument.default_value)
        elif "number" in kind or kind in ("float", "int"):
            given.append(1)
        else:
            return None
    return given
