import pytest
import torch
from torch import Tensor, nn

from kvpass.fx_passes.value_ledger import ValueLedger, digests, sum_on_device
from tests.changing import CASES, Case, Changing


def watched(case: Case) -> dict[str, str]:
    guard = case.compile(case.build()).module.guard  # type: ignore[attr-defined]
    assert guard is not None
    found: dict[str, str] = guard.watched
    return found


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("rotations", "heads", "layers")])
def test_what_was_read_is_recorded_by_its_path_and_no_weight_is(name: str) -> None:
    case = CASES[name]
    found = watched(case)
    assert case.named in found
    assert not [path for path in found if path.endswith("weight")]
    assert any(found[case.named].startswith(feed) for feed in case.feeds) or not case.feeds


@pytest.mark.slow
def test_equal_heads_have_their_weights_recorded_and_others_none() -> None:
    assert watched(Case(Changing, lambda m: None, "", ())) == {}
    assert set(watched(CASES["heads"])) == {"k.weight", "v.weight"}
    assert {"k.weight", "k2.weight", "v.weight", "v2.weight"} <= set(watched(CASES["layers"]))


class Repeated(Changing):
    """Grouped heads that the graph repeats, whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(32, 16, bias=False) for _ in range(2))

    def heads(self, projection: nn.Module, h: Tensor) -> Tensor:
        found = projection(h).unflatten(-1, (-1, 16)).transpose(1, 2)
        return found.repeat_interleave(2 // found.shape[1], 1)


def test_heads_that_the_graph_repeats_need_no_weight_to_stay() -> None:
    case = Case(Repeated, lambda m: None, "", ())
    engine = case.compile(case.build())
    assert engine.plan.caches[0].num_kv_heads == 1
    assert engine.module.guard.watched == {}  # type: ignore[attr-defined]


def test_a_ledger_keeps_the_first_reason_and_leaves_out_the_own_tensors_of_the_rewrite() -> None:
    mine = torch.ones(3)
    ledger = ValueLedger({"a": mine})
    ledger.record("a", mine, "one")
    ledger.record("a", mine, "another")
    ledger.record("_folded_0", mine, "one")
    other = ledger.copy()
    other.record("a", mine, "one")
    assert {name: entry.decided for name, entry in ledger.entries.items()} == {"a": "one"}
    assert other.entries is not ledger.entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_a_digest_sees_each_entry_and_the_order(dtype: torch.dtype) -> None:
    tensor = (torch.arange(60).view(6, 10) % 7 > 4).to(dtype)
    for change in (lambda t: t.T, lambda t: t.flip(0), lambda t: torch.zeros_like(t)):
        assert digests([change(tensor)]) != digests([tensor])
    assert digests([tensor.clone()]) == digests([tensor])
    content = tensor.flatten().view(torch.uint8) if dtype is not torch.complex64 else torch.arange(8, dtype=torch.uint8)
    assert sum_on_device(content) != sum_on_device(content.flip(0))
    assert sum_on_device(content) == sum_on_device(content.clone())


def test_the_sum_of_a_device_sees_signs_that_all_change() -> None:
    tensor = torch.randn(1 << 18)
    one, other = (t.view(torch.uint8) for t in (tensor, -tensor))
    assert sum_on_device(one) != sum_on_device(other)
