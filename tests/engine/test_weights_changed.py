from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.fx_passes import ledger_check
from kvpass.fx_passes.value_ledger import ValueLedger
from tests.changing import CASES, PROMPT, Case, Changing, differs, naive

EXACT, APART = 1e-3, 2e-2
PLAIN = Case(Changing, lambda m: None, "", ())


def quietly(change: Callable[[Any], object], model: Any) -> None:
    with torch.no_grad():
        change(model)


def is_empty(engine: kvpass.Engine) -> bool:
    engine.check_integrity()
    engine.cache.clear()
    return engine.stats().blocks_used == 0


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", CASES)
def test_a_value_that_was_read_and_is_changed_is_an_error_that_names_it(name: str) -> None:
    case = CASES[name]
    model = case.build()
    engine = case.compile(model)
    bound = EXACT if case.config == {} else 1.0
    assert differs(engine, model) < bound
    quietly(case.change, model)
    for ask in (
        lambda: engine.generate([PROMPT], 2),
        lambda: list(engine.stream([PROMPT], 2)),
        lambda: engine.submit(PROMPT, 2),
        lambda: engine.beam_search(PROMPT, 2, beams=2),
    ):
        with pytest.raises(kvpass.WeightsChangedError, match=f"^{case.named.replace('[', '.').replace(']', '.')} "):
            ask()
    assert is_empty(engine)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.feeds])
def test_without_its_feed_each_change_would_be_wrong_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every place which feeds the ledger has a model that needs it."""
    case, record = CASES[name], ValueLedger.record

    def forgetful(self: ValueLedger, path: str, tensor: Tensor, decided: str) -> None:
        if not decided.startswith(case.feeds):
            record(self, path, tensor, decided)

    monkeypatch.setattr(ValueLedger, "record", forgetful)
    model = case.build()
    engine = case.compile(model)
    quietly(case.change, model)
    assert differs(engine, model) > APART


def test_without_the_note_of_joined_weights_other_memory_would_be_wrong_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(model: Any) -> None:
        model.v.weight.data = -model.v.weight.data

    model = PLAIN.build()
    engine = PLAIN.compile(model)
    move(model)
    with pytest.raises(kvpass.WeightsChangedError, match=r"^v\.weight was given other memory"):
        engine.generate([PROMPT], 2)
    monkeypatch.setattr(ValueLedger, "join", lambda *given: None)
    model = PLAIN.build()
    engine = PLAIN.compile(model)
    move(model)
    assert differs(engine, model) > APART


def _step_of_sgd(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    ids = torch.tensor([PROMPT])
    with torch.enable_grad():
        torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
    optimizer.step()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({name: t * 1.3 for name, t in m.state_dict().items()}),
        lambda m: [p.data.mul_(1.1) for p in m.parameters()],
        lambda m: m.v.weight.data.copy_(-m.v.weight),
        lambda m: m.v.weight.copy_(-m.v.weight),
        _step_of_sgd,
        lambda m: m.embed.weight.detach().numpy().__imul__(1.2),
    ],
    ids=["load_state_dict", "data.mul_", "data.copy_", "copy_", "optimizer.step", "numpy"],
)
def test_weights_that_decided_nothing_may_change_and_nothing_of_before_is_reused(change: Any) -> None:
    model = PLAIN.build()
    engine = PLAIN.compile(model)
    assert engine.generate([PROMPT], 6) == [naive(model, PROMPT, 6)[0]]
    quietly(change, model)
    assert differs(engine, model) < EXACT
    assert differs(engine, model) < EXACT
    assert engine.stats().prefix_hit_tokens > 0, "what is computed with the new weights is reused"
    assert is_empty(engine)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.flip(0))), "head.weight"),
        (lambda m: setattr(m, "o", nn.Linear(32, 32, bias=False)), "o"),
        (lambda m: setattr(m.q, "bias", nn.Parameter(torch.ones(32))), "q.bias"),
        (lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}, assign=True), "norm.weight"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.v), "v.weight"),
        (lambda m: m.double(), "embed.weight"),
    ],
    ids=["parameter", "module", "bias", "assign", "parametrized", "dtype"],
)
def test_what_was_replaced_is_an_error(change: Any, named: str) -> None:
    model = PLAIN.build()
    engine = PLAIN.compile(model)
    quietly(change, model)
    with pytest.raises(kvpass.WeightsChangedError):
        engine.generate([PROMPT], 2)
    with pytest.raises(kvpass.WeightsChangedError):
        engine.submit(PROMPT, 2)
    assert is_empty(engine)
    assert named


def test_the_error_reaches_who_waits_and_putting_the_value_back_goes_on() -> None:
    case = CASES["mask of a buffer"]
    model: Any = case.build()
    engine = case.compile(model)
    wanted = naive(model, PROMPT, 6)[0]
    handle = engine.submit(PROMPT, 6)
    engine.step()
    table = model.table.clone()
    quietly(case.change, model)
    with pytest.raises(kvpass.WeightsChangedError, match=r"^table "):
        handle.result()
    model.table.copy_(table)
    assert handle.result() == wanted
    handle = engine.submit(PROMPT, 6)
    model.table.mul_(2)
    with engine.serving(), pytest.raises(kvpass.WeightsChangedError, match=r"^table "):
        handle.result()
    assert handle.finish_reason == "error"
    assert is_empty(engine)


def test_equal_values_may_be_loaded_again() -> None:
    case = CASES["heads"]
    model = case.build()
    engine = case.compile(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert differs(engine, model) < EXACT


def test_own_schedulers_get_the_error_too() -> None:
    case = CASES["mask"]
    model = case.build()
    engine = case.compile(model)
    guard = engine.module.guard  # type: ignore[attr-defined]
    guard.check_step(5, 1)
    quietly(case.change, model)
    guard.check_step(1, 1)  # a change through .data is seen where a prompt is computed
    with pytest.raises(kvpass.WeightsChangedError):
        guard.check_step(5, 1)
    quietly(lambda m: m.table.add_(1), model)
    with pytest.raises(kvpass.WeightsChangedError):
        guard.check_step(1, 1)


def test_decode_steps_compute_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mask"]
    engine = case.compile(case.build())
    calls, digests = [], ledger_check.digests
    monkeypatch.setattr(ledger_check, "digests", lambda tensors: calls.append(len(tensors)) or digests(tensors))
    handle = engine.submit(PROMPT, 12)
    engine.step()
    before = len(calls)
    assert before == 2  # at admission, and for the step with the prompt
    handle.result()
    assert len(calls) == before


def test_requests_under_way_keep_what_they_computed_with_other_weights_to_themselves() -> None:
    model = PLAIN.build()
    engine = PLAIN.compile(model)
    under_way = engine.submit(PROMPT[:5], 30)
    engine.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.2)
    assert differs(engine, model, PROMPT) < EXACT
    tokens = under_way.result()
    assert differs(engine, model, PROMPT[:5] + tokens) < EXACT
    assert is_empty(engine)


@pytest.mark.slow
def test_said_by_the_caller() -> None:
    model = PLAIN.build()
    engine = PLAIN.compile(model)
    engine.generate([PROMPT], 3)
    assert engine.stats().blocks_cached > 0
    engine.weights_changed()
    assert engine.stats().blocks_cached == 0
    case = CASES["mask"]
    model = case.build()
    engine = case.compile(model)
    model.table.data[3, 1] = 7.0  # type: ignore[union-attr, operator]
    with pytest.raises(kvpass.WeightsChangedError, match=r"^table "):
        engine.weights_changed()


def test_the_disk_is_that_of_the_weights(tmp_path: Path) -> None:
    case = Case(Changing, lambda m: None, "", (), config={"disk": tmp_path, "host_memory": "8MiB"})
    model = case.build()
    engine = case.compile(model)
    engine.generate([PROMPT], 3)
    engine.cache.save()
    kept = {path.parent.name: path.stat().st_size for path in tmp_path.glob("*/*.sqlite")}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quietly(lambda m: [p.data.mul_(1.2) for p in m.parameters()], model)
    assert differs(engine, model) < EXACT
    engine.cache.save()
    assert differs(engine, model) < EXACT
    engine.close()
    assert len(list(tmp_path.iterdir())) == 2 and set(kept) < {path.name for path in tmp_path.iterdir()}
    model.load_state_dict(state)
    engine = case.compile(model)
    assert differs(engine, model) < EXACT
    assert engine.stats().tiers.read > 0
    engine.close()


@pytest.mark.slow
def test_a_draft_engine_looks_after_its_own_weights() -> None:
    model, small = PLAIN.build(), CASES["mask"].build()
    draft = CASES["mask"].compile(small)
    engine = PLAIN.compile(model)
    engine.speculate(kvpass.DraftEngine(draft, max_draft=3))
    wanted = [naive(model, PROMPT, 8)[0]]
    assert engine.generate([PROMPT], 8) == wanted
    quietly(lambda m: [p.data.mul_(1.1) for p in (m.q.weight, m.o.weight)], small)
    assert engine.generate([PROMPT], 8) == wanted
    quietly(lambda m: [p.data.mul_(1.1) for p in m.parameters()], model)
    assert engine.generate([PROMPT], 8) == [naive(model, PROMPT, 8)[0]]
    quietly(CASES["mask"].change, small)
    with pytest.raises(kvpass.WeightsChangedError, match=r"^table "):
        draft.generate([PROMPT], 8)
    engine.speculate(None)
    assert engine.generate([PROMPT], 8) == [naive(model, PROMPT, 8)[0]]


def test_a_recompiler_watches_its_model() -> None:
    case = CASES["mask"]
    model = case.build()
    engine = kvpass.compiler.Recompiler(model).compile(kvpass.CacheConfig(block_size=8, num_blocks=16), verify=False)
    quietly(case.change, model)
    with pytest.raises(kvpass.WeightsChangedError, match=r"^table "):
        engine.generate([PROMPT], 2)
