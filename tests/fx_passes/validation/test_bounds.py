"""Bounds in low precision come from the noise of the original, and catch what a fixed 1e-1 let pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import kvpass
from kvpass.fx_passes.graph import arguments, is_call
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.validation import checks
from kvpass.fx_passes.validation.bounds import FIXED, SHARE, Noise
from kvpass.fx_passes.validation.verify import Comparison, verify
from tests.decoders.catalogue import DECODERS
from tests.parity.harness import CONFIG, SEED

FORMER = 1e-1
SEQUENCES = [torch.arange(40) % 29, torch.arange(31) % 29, torch.arange(5)]
WEIGHTS = torch.randn(29, 29, generator=torch.Generator().manual_seed(0))


def table(ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A model of one product."""
    rows = WEIGHTS.to(dtype)[ids]
    return (rows @ WEIGHTS.to(dtype)) * 0.1


def routed(ids: Tensor) -> Tensor:
    """One row of many is close to a choice."""
    near = table(ids)
    return torch.where((ids == 3)[..., None] & (near.float().sum(-1, keepdim=True) > CLOSE), 40 * near, near)


CLOSE = float(table(torch.tensor([3])).float().sum())


def test_float32_has_a_bound_of_its_own_and_runs_nothing() -> None:
    def never(ids: Tensor) -> Tensor:
        raise AssertionError

    assert Noise({torch.float32, torch.float64}, never, SEQUENCES).bound().tolerance == FIXED[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_calm_model_has_a_narrow_bound(dtype: torch.dtype) -> None:
    bound = Noise({torch.float32, dtype}, lambda ids: table(ids, dtype), SEQUENCES).bound()
    assert bound.tolerance < 6 * torch.finfo(dtype).eps
    assert bound.share == 1.0


def test_rows_may_differ_only_where_noise_has_shown_it() -> None:
    noise = Noise({torch.bfloat16}, routed, SEQUENCES)
    noise.bound()
    assert noise.bound_with_more().share == SHARE


class _Faulty:
    """Verifies a spoilt rewrite in place of the right one, which it verifies first."""

    def __init__(self, fault: Callable[[Node], None]) -> None:
        self.fault = fault
        self.right, self.wrong = Comparison(), Comparison()

    def __call__(self, original: Any, reference: Any, paged: PagedGraph, module: Any, bound: float = 0.0) -> Comparison:
        self.right = verify(original, reference, paged, module, bound)
        spoilt = GraphModule(paged.observed, copy.deepcopy(paged.observed.graph))
        for node in spoilt.graph.nodes:
            if is_call(node, torch.ops.kvpass.paged_attention):
                self.fault(node)
        spoilt.recompile()
        other = PagedGraph(spoilt, paged.plan, spoilt, paged.site_names)
        self.wrong = verify(original, reference, other, PagedModule(other), bound)
        return self.wrong


def _set(node: Node, name: str, change: Callable[[Any], Any]) -> None:
    named = arguments(node)
    names = [argument.name for argument in node.target._schema.arguments]
    node.args, node.kwargs = tuple((named | {name: change(named[name])})[n] for n in names), {}


# Name of the decoder, how much smaller its matrices are, and the fault.
FAULTS: dict[str, tuple[str, float, Callable[[Node], None]]] = {
    "window one too narrow": ("band of triu and tril, rotary", 0.2, lambda n: _set(n, "window", lambda w: w - 1)),
    "scale a tenth too small": ("band of triu and tril, rotary", 0.5, lambda n: _set(n, "scale", lambda s: 0.9 * s)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_that_a_tenth_let_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, factor, fault = FAULTS[name]
    model = DECODERS[decoder](SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
    faulty = _Faulty(fault)
    monkeypatch.setattr(checks, "verify", faulty)
    with pytest.raises(kvpass.VerificationError):
        kvpass.compile(model.bfloat16(), CONFIG)
    assert faulty.right.passed, faulty.right
    assert not faulty.wrong.passed and max(faulty.wrong.errors.values()) < FORMER
