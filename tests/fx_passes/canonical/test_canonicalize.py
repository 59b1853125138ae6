"""One spelling per op: golden graphs before and after, the same numbers, and nothing left for a second run.

`KVPASS_REWRITE_GOLDEN=1 pytest tests/fx_passes` writes the golden files anew; read the difference before committing it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import aten, is_call
from tests.fx_passes.tracing import VOCAB, Cases, captured, compare_golden, graph_text, outputs

SPELLINGS = {
    "views": lambda m, x: x.contiguous().view(x.size(0), x.size(1), 2, 3).reshape(x.size(0), -1, 6),
    "no_ops": lambda m, x: (F.dropout(x.to(x.dtype).clone(), 0.1, False)[:, :] + 0) * 1 / 1,
    "transposed_twice": lambda m, x: x.transpose(-1, -2).transpose(2, 1),
    "pairs_apart": lambda m, x: torch.view_as_complex(x.unflatten(-1, (2, 3)).mT.contiguous()).abs(),
    "softmax_by_hand": lambda m, x: _over_sum((x - x.amax(-1, keepdim=True)).exp()),
    "softmax_by_division": lambda m, x: _over_sum(x.exp()),
    "softmax_by_log": lambda m, x: x.log_softmax(-1).exp(),
    "softmax_by_logsumexp": lambda m, x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "softmax_plus_one": lambda m, x: _over_sum(x.exp(), 1),
    "built_in_place": lambda m, x: _built_in_place(x),
}
# What looks alike and must stay: the dim is lost, the numbers differ, or the dtype would.
KEPT = {
    "sum over another dim": lambda m, x: x.exp() / x.exp().sum(1, keepdim=True).exp(),
    "sum of something else": lambda m, x: x.exp() / (x + 1).exp().sum(-1, keepdim=True),
    "less two": lambda m, x: _over_sum(x.exp(), -2),
    "one added twice over": lambda m, x: x.exp() / torch.add(x.exp().sum(-1, keepdim=True), 1, alpha=2),
    "log_softmax to another dtype": lambda m, x: x.float().log_softmax(-1, dtype=torch.float64).exp(),
    "rounded division": lambda m, x: torch.div(x, 1, rounding_mode="floor"),
    "cast that rounds": lambda m, x: x.float().double(),
    "slice from one": lambda m, x: x[..., 1:],
}


def _over_sum(top: Tensor, extra: int = 0) -> Tensor:
    total = top.sum(-1, keepdim=True)
    return top / (total + extra if extra else total)


def _built_in_place(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[...] = x * 2
    return out


def run(graph, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(graph.module(ids))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SPELLINGS)
def test_golden_before_and_after(name: str) -> None:
    graph = captured(Cases({name: SPELLINGS[name]}))
    ids = torch.randint(0, VOCAB, (2, 5))
    before, text = run(graph, ids), graph_text(graph)
    assert Canonicalize().apply(graph).rewritten > 0
    compare_golden(f"canonicalize_{name}", f"# before\n{text}\n# after\n{graph_text(graph)}")
    for old, new in zip(before, run(graph, ids), strict=True):
        torch.testing.assert_close(new, old)
    after = graph_text(graph)
    assert Canonicalize().apply(graph).rewritten == 0 and graph_text(graph) == after


def test_what_only_looks_alike_keeps_its_numbers() -> None:
    graph = captured(Cases(KEPT))
    ids = torch.randint(0, VOCAB, (2, 5))
    before = run(graph, ids)
    Canonicalize().apply(graph)
    for name, old, new in zip(["x", *KEPT], before, run(graph, ids), strict=True):
        assert new.dtype == old.dtype, name
        torch.testing.assert_close(new, old, msg=lambda text, n=name: f"{n}: {text}")
    softmaxes = [n for n in graph.graph.nodes if is_call(n, aten.softmax)]
    assert softmaxes == [] and len(outputs(graph)) == len(KEPT) + 1
