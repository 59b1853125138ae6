"""An operand that an op takes as a weight may not carry tokens, whatever the op: held for every operand of the table.

Each case puts a number that depends on all tokens where the op expects a constant, so that every token's result depends
on every token. A mutation test then deletes the declaration, operand by operand: without it the case is accepted.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverloadPacket

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph
from kvpass.fx_passes.op_facts.facts import packet_of
from kvpass.fx_passes.op_facts.table import FACTS
from kvpass.fx_passes.token_axis.axes import Axes, Mixed
from kvpass.fx_passes.token_axis.infer_axes import Several
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from tests.fx_passes.tracing import VOCAB, Cases, captured, outputs

aten = torch.ops.aten
Case = Callable[[Cases, Tensor], Tensor]


def of_all(x: Tensor) -> Tensor:
    """A number that every token has a part in."""
    return x.mean().abs()


def channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def normed(m: Cases, x: Tensor, **changed: Tensor) -> Tensor:
    given = {"weight": m.vector, "bias": m.vector, "running_mean": m.vector, "running_var": m.vector.abs(), **changed}
    return F.batch_norm(channels(x), given["running_mean"], given["running_var"], given["weight"], given["bias"])


def kernel(m: Cases, x: Tensor) -> Tensor:
    return (m.square * of_all(x))[:, :, None]


# By op and operand: the operand is a function of all tokens.
CASES: dict[tuple[OpOverloadPacket, str], Case] = {
    (aten.layer_norm, "weight"): lambda m, x: F.layer_norm(x, (6,), m.vector * of_all(x), m.vector),
    (aten.layer_norm, "bias"): lambda m, x: F.layer_norm(x, (6,), m.vector, m.vector * of_all(x)),
    (aten.native_layer_norm, "weight"): lambda m, x: torch.native_layer_norm(x, [6], m.vector * of_all(x), None, 1e-5)[
        0
    ],
    (aten.native_layer_norm, "bias"): lambda m, x: torch.native_layer_norm(x, [6], None, m.vector * of_all(x), 1e-5)[0],
    (aten.rms_norm, "weight"): lambda m, x: F.rms_norm(x, (6,), m.vector * of_all(x)),
    (aten._fused_rms_norm, "weight"): lambda m, x: torch._fused_rms_norm(x, [6], m.vector * of_all(x), 1e-5)[0],
    (aten.group_norm, "weight"): lambda m, x: F.group_norm(x.flatten(0, 1), 2, m.vector * of_all(x), m.vector).view_as(
        x
    ),
    (aten.group_norm, "bias"): lambda m, x: F.group_norm(x.flatten(0, 1), 2, m.vector, m.vector * of_all(x)).view_as(x),
    (aten._native_batch_norm_legit_no_training, "weight"): lambda m, x: normed(m, x, weight=m.vector * of_all(x)),
    (aten._native_batch_norm_legit_no_training, "bias"): lambda m, x: normed(m, x, bias=m.vector * of_all(x)),
    (aten._native_batch_norm_legit_no_training, "running_mean"): lambda m, x: normed(
        m, x, running_mean=m.vector * of_all(x)
    ),
    (aten._native_batch_norm_legit_no_training, "running_var"): lambda m, x: normed(
        m, x, running_var=m.vector.abs() + of_all(x)
    ),
    (aten.conv1d, "weight"): lambda m, x: F.conv1d(channels(x), kernel(m, x)),
    (aten.conv1d, "bias"): lambda m, x: F.conv1d(channels(x), m.square[:, :, None], m.vector * of_all(x)),
    (aten.conv2d, "weight"): lambda m, x: F.conv2d(channels(x)[..., None], kernel(m, x)[..., None]),
    (aten.conv2d, "bias"): lambda m, x: F.conv2d(
        channels(x)[..., None], m.square[:, :, None, None], m.vector * of_all(x)
    ),
    (aten.prelu, "weight"): lambda m, x: F.prelu(channels(x), m.vector * of_all(x)),
    (aten.bucketize, "boundaries"): lambda m, x: torch.bucketize(x, m.vector.sort().values * of_all(x)),
    (aten.embedding, "weight"): lambda m, x: F.embedding(x[..., 0].long().clamp(0, 5), m.square * of_all(x)),
    (aten.bincount, "weights"): lambda m, x: (
        x + torch.bincount(x.flatten().long().clamp(0, 5), x.flatten(), minlength=6)
    ),
}
# Operands that no traced graph shows: the op, or the overload, is taken apart before a pass could see it.
NOT_SEEN = {
    (aten.batch_norm, "weight"), (aten.batch_norm, "bias"), (aten.batch_norm, "running_mean"),
    (aten.batch_norm, "running_var"), (aten.convolution, "weight"), (aten.convolution, "bias"),
    (aten.narrow, "start"), (aten.tensor_split, "tensor_indices_or_sections"), (aten.index, "el"),
    (aten.repeat_interleave, "repeats"),  # a number of repeats from data is refused by its size
    (aten._grouped_mm, "mat2"), (aten._grouped_mm, "bias"),  # below, by hand: its rows must be sorted first
}  # fmt: skip
# These are refused by their own rule as well.
REFUSED_TWICE = {(aten.embedding, "weight"), (aten.bincount, "weights")}


@pytest.fixture(scope="module")
def graph() -> CapturedGraph:
    result = captured(Cases({str(key): case for key, case in CASES.items()}))
    Canonicalize().apply(result)
    return result


def labels(graph: CapturedGraph) -> dict[tuple[OpOverloadPacket, str], Axes | Several | Mixed]:
    results = token_axes(graph).results
    return dict(zip(CASES, (results[node] for node in outputs(graph)[1:]), strict=True))


def test_every_operand_that_must_be_a_constant_has_a_case() -> None:
    demanded = {
        (op, argument.name)
        for op, facts in FACTS.items()
        if facts.tokens is not None and facts.axes and not facts.fresh
        for overload in op.overloads()
        for schema in [getattr(op, overload)._schema]
        if not schema.is_mutable
        for argument in schema.arguments
        if "Tensor" in str(argument.type) and argument.name not in facts.tokens and not argument.is_out
    }
    assert demanded == set(CASES) | NOT_SEEN


@pytest.mark.parametrize("key", CASES, ids=str)
def test_the_op_is_in_the_graph(graph: CapturedGraph, key: tuple[OpOverloadPacket, str]) -> None:
    assert key[0] in {packet_of(node.target) for node in graph.graph.nodes}


@pytest.mark.parametrize("key", CASES, ids=str)
def test_an_operand_that_carries_tokens_is_refused(graph: CapturedGraph, key: tuple[OpOverloadPacket, str]) -> None:
    found = labels(graph)[key]
    assert isinstance(found, Mixed) and f"takes its {key[1]} from the tokens" in found.reason


@pytest.mark.parametrize("key", [key for key in CASES if key not in REFUSED_TWICE], ids=str)
def test_without_its_declaration_the_operand_would_pass(
    graph: CapturedGraph, key: tuple[OpOverloadPacket, str]
) -> None:
    op, operand = key
    facts = FACTS[op]
    with patch.dict(FACTS, {op: replace(facts, tokens=(*facts.tokens, operand))}):
        assert not isinstance(labels(graph)[key], Mixed)
    assert isinstance(labels(graph)[key], Mixed)


def test_what_is_refused_depends_on_every_token(graph: CapturedGraph) -> None:
    ids = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 3) % VOCAB
    with torch.no_grad():
        before, after = (graph.module(each)[1:] for each in (ids, other))
    for key, a, b in zip(CASES, before, after, strict=True):
        if key[0] is not aten.bucketize:  # rounds to a bucket
            assert (a[1] - b[1]).abs().max() > 1e-9, key


def test_weights_of_groups_may_not_carry_tokens() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(VOCAB, 16)
            self.experts = torch.nn.Parameter(torch.randn(4, 16, 16))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids).flatten(0, 1)
            keys, order = (ids.flatten() % 4).sort()
            ends = torch.histc(keys.float(), 4, 0, 3).cumsum(0).to(torch.int32)
            y = torch._grouped_mm(x[order].bfloat16(), (self.experts * of_all(x)).bfloat16(), offs=ends)
            return y[order.argsort()].view(*ids.shape, 16)

    graph = captured(Experts())
    results = token_axes(graph).results
    found = next(results[n] for n in graph.graph.nodes if packet_of(n.target) is aten._grouped_mm)
    assert isinstance(found, Mixed) and "takes its mat2 from the tokens" in found.reason
