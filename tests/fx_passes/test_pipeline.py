"""How passes are run: dialects between them, failures as refusals, analyses that are kept, inputs by their roles."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.capture.normalise_inputs import NormaliseInputs
from kvpass.fx_passes.dialects import DENSE, PAGED, PROVEN, TAKEN_IN
from kvpass.fx_passes.graph import ROLE, CapturedGraph, PassResult, Role, aten, emit, is_call, role_of
from kvpass.fx_passes.masks.read_masks import MASK
from kvpass.fx_passes.pipeline import Dialect, PassLog, Refused, failing_closed, run_passes
from kvpass.fx_passes.shape_values import classify
from kvpass.fx_passes.stages import lower_stage, plan, prove, prove_stage
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from tests.decoders.catalogue import DECODERS
from tests.fx_passes.tracing import captured
from tests.parity.harness import SEED


@dataclass(frozen=True)
class Doing:
    """A pass that does what it is told."""

    what: object = None
    rewritten: int = 0
    name: str = "doing"

    def apply(self, state: CapturedGraph) -> PassResult:
        if isinstance(self.what, Exception):
            raise self.what
        if callable(self.what):
            self.what(state)
        return PassResult(self.rewritten)


@pytest.fixture
def graph() -> CapturedGraph:
    return captured(DECODERS["GQA by repeat_interleave"](SEED))


def test_a_pass_that_raises_is_a_refusal_and_nothing_runs_behind_it(graph: CapturedGraph) -> None:
    ran: list[int] = []
    log = run_passes(graph, (Doing(KeyError("lost")), Doing(lambda state: ran.append(1))))
    assert [r.pass_name for r in log.refusals] == ["doing"] and "a defect of kvpass" in log.refusals[0].reason
    assert isinstance(log.error, KeyError) and not ran


@pytest.mark.sampled(2)
@pytest.mark.parametrize("error", [ConfigError("an option"), MemoryError()])
def test_errors_that_are_the_callers_pass(graph: CapturedGraph, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_passes(graph, (Doing(error),), passing=(ConfigError,))


def test_a_dialect_is_checked_where_it_stands_and_after_each_pass_behind_it(graph: CapturedGraph) -> None:
    asked: list[str] = []
    dialect = Dialect("watched", (lambda state: asked.append("x") or (),))
    run_passes(graph, (Doing(), dialect, Doing(), Doing()))
    assert len(asked) == 3


def test_a_broken_dialect_names_the_pass_and_the_node(graph: CapturedGraph) -> None:
    def lose_role(state: CapturedGraph) -> None:
        del state.input_ids.meta[ROLE]

    log = run_passes(graph, (TAKEN_IN, Doing(lose_role, name="forgetful"), Doing(name="never")))
    assert {r.pass_name for r in log.refusals} == {"forgetful"} and "never" not in log.seconds
    assert "is not a graph of token ids: it is an input without a role" in log.refusals[0].reason


def break_mask(state: CapturedGraph) -> None:
    del attention_sites(state)[0].meta[MASK]


def break_operand(state: CapturedGraph) -> None:
    site = attention_sites(state)[0]
    with state.graph.inserting_before(site):
        flat = emit(state, aten.flatten.using_ints, site.args[0], 0, 1)
    site.update_arg(0, flat)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("dialect", "fault", "complaint"),
    [
        (PROVEN, break_mask, "has a mask that was not read"),
        (DENSE, break_operand, "has operands that are not [batch, heads, length, width]"),
        (PAGED, lambda state: None, "is an attention over whole sequences"),
    ],
)
def test_each_dialect_finds_its_fault(graph: CapturedGraph, dialect: Dialect, fault, complaint: str) -> None:
    assert prove(graph).refusals == []
    if dialect is not PAGED:
        assert dialect.broken(graph, "nothing") == []
    fault(graph)
    assert any(complaint in refusal.reason for refusal in dialect.broken(graph, "a test"))


def test_what_was_not_proven_is_not_planned() -> None:
    proof = prove(captured(nn.Sequential(nn.Embedding(31, 8), nn.Linear(8, 31))))
    with pytest.raises(Refused, match="no attention was found"):
        plan(proof, CacheConfig(), 31)


def test_a_step_that_fails_behind_the_passes_is_a_refusal() -> None:
    log = PassLog()
    with pytest.raises(Refused), failing_closed(log, "bind"):
        raise IndexError("out of it")
    assert log.refusals[0].pass_name == "bind" and isinstance(log.error, IndexError) and "bind" in log.seconds


def test_analyses_are_kept_until_the_graph_changes(graph: CapturedGraph) -> None:
    Canonicalize().apply(graph)
    kinds, axes = graph.analysis(classify), graph.analysis(token_axes)
    assert graph.analysis(classify) is kinds and graph.analysis(token_axes) is axes and axes.kinds is kinds
    run_passes(graph, (Doing(rewritten=0),))
    assert graph.analysis(token_axes) is axes
    run_passes(graph, (Doing(rewritten=1),))
    assert graph.analysis(token_axes) is not axes
    again = graph.analysis(classify)
    with graph.graph.inserting_after(graph.input_ids):
        emit(graph, aten.add.Tensor, graph.input_ids, 1)
    assert graph.analysis(classify) is not again


def test_names_of_passes_differ_from_stage_to_stage() -> None:
    steps = (*prove_stage(CacheConfig()), *lower_stage(fuse=True, fold=True))
    names = [step.name for step in steps if not isinstance(step, Dialect)]
    assert len(set(names)) >= len(names) - 1  # one runs twice


class Padded(nn.Module):
    """A decoder that takes a padding mask and the length, as other fronts hand them over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DECODERS["GQA by repeat_interleave"](SEED)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(ids) * mask[..., None]


def with_roles(*roles: Role) -> CapturedGraph:
    """The graph of a decoder with a second input, which then gets these roles."""
    graph = captured(Padded(), position_ids=True)
    node = graph.inputs.pop(Role.POSITIONS)
    node.meta[ROLE] = roles[0]
    return graph


def test_a_mask_of_ones_is_ones() -> None:
    graph = with_roles(Role.MASK_OF_ONES)
    assert prove(graph).refusals == []
    assert [role_of(n) for n in graph.graph.nodes if n.op == "placeholder"] == [Role.TOKENS]
    ids = torch.randint(0, 31, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(graph.module(ids)[0], DECODERS["GQA by repeat_interleave"](SEED)(ids))


def test_data_of_each_token_is_refused_by_its_role() -> None:
    graph = with_roles(Role.PER_TOKEN_DATA)
    (refusal,) = NormaliseInputs().apply(graph).refusals
    assert "that each token brings along" in refusal.reason and "no step carries it" in refusal.reason


def test_a_size_is_read_off_the_token_ids(graph: CapturedGraph) -> None:
    with graph.graph.inserting_after(graph.input_ids):
        size = graph.graph.placeholder("s1")
    size.meta |= {ROLE: Role.SIZE, "val": graph.input_ids.meta["val"].shape[1]}
    user = next(n for n in graph.graph.nodes if is_call(n, aten.sym_size) and n.args[1] == 1)
    user.replace_all_uses_with(size)
    assert NormaliseInputs().apply(graph) == PassResult(1)
    assert all(role_of(n) in (None, Role.TOKENS) for n in graph.graph.nodes)
    graph.tidy()
    ids = torch.randint(0, 31, (2, 7))
    assert graph.module(ids)[0].shape[:2] == (2, 7)
