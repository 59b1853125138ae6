"""Which backend serves a call, what is said when one does not, and what debug mode finds."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvpass.errors import ConfigError, InputError, KvpassWarning
from kvpass.kernels import backends, ops
from kvpass.kernels.backends import Backend, choose, implementation_of
from kvpass.kernels.reference import backend as reference
from tests.kernels.random_cases import attention_case

QUERY = {"query": torch.zeros(1)}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Put ``quick``, a backend for the device type ``fast``, in front of the reference; its parts may be changed."""
    monkeypatch.delenv("KVPASS_BACKEND", raising=False)
    parts: dict[str, Any] = {
        "available": lambda: True,
        "unsupported": lambda op, **arguments: arguments.get("why"),
        "paged_attention": lambda *args, **kwargs: "quick",
    }
    rows = (Backend("quick", "quick", ("fast",)), *backends.BACKENDS[-1:])
    monkeypatch.setattr(backends, "BACKENDS", rows)

    def import_module(name: str) -> Any:
        return reference if name == "kvpass.kernels.reference.backend" else types.SimpleNamespace(**parts)

    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    for cached in (backends.find, backends.say_once):
        cached.cache_clear()
    yield parts
    for cached in (backends.find, backends.say_once):
        cached.cache_clear()


def test_the_first_that_serves_the_device_and_has_the_op_is_taken(table: dict[str, Any]) -> None:
    assert choose("paged_attention", "fast", QUERY)() == "quick"
    assert choose("paged_attention", "cpu", QUERY) is reference.paged_attention
    assert choose("gather_cache", "fast", QUERY) is reference.gather_cache


def test_a_call_that_is_not_served_goes_on_and_is_said_once(table: dict[str, Any]) -> None:
    with pytest.warns(KvpassWarning, match=r"kvpass::paged_attention: the backend quick does not serve .*no fp8 here"):
        assert choose("paged_attention", "fast", {"why": "no fp8 here"}) is reference.paged_attention
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("paged_attention", "fast", {"why": "no fp8 here"})


@pytest.mark.parametrize("missing", [lambda: False, lambda: (_ for _ in ()).throw(OSError("no such object"))])
def test_a_backend_that_cannot_run_is_passed_over_and_said_once(missing: Any, table: dict[str, Any]) -> None:
    table["available"] = missing
    table["why_unavailable"] = lambda: "no compiler was found"
    with pytest.warns(KvpassWarning, match=r"quick does not serve, .*(no compiler was found|no such object)"):
        assert choose("paged_attention", "fast", QUERY) is reference.paged_attention
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("paged_attention", "fast", QUERY)


def test_the_environment_forces_a_backend(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_BACKEND", "reference")
    assert choose("paged_attention", "fast", QUERY) is reference.paged_attention
    monkeypatch.setenv("KVPASS_BACKEND", "quick")
    assert choose("paged_attention", "cpu", QUERY)() == "quick"
    assert choose("gather_cache", "cpu", QUERY) is reference.gather_cache
    with pytest.raises(InputError, match=r"kvpass::paged_attention cannot be served by KVPASS_BACKEND=quick: too odd"):
        choose("paged_attention", "cpu", {"why": "too odd"})
    monkeypatch.setenv("KVPASS_BACKEND", "quicker")
    with pytest.raises(ConfigError, match=r"KVPASS_BACKEND=quicker does not exist: choose one of quick, reference"):
        choose("paged_attention", "cpu", QUERY)


def test_a_forced_backend_that_cannot_run_is_an_error(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table["available"] = lambda: False
    monkeypatch.setenv("KVPASS_BACKEND", "quick")
    table["why_unavailable"] = lambda: "there is no device"
    with pytest.raises(
        InputError, match="KVPASS_BACKEND=quick cannot run on this machine, unset it: there is no device"
    ):
        choose("paged_attention", "cpu", QUERY)


def test_every_op_has_a_reference_and_a_shape_function() -> None:
    for name in ops.SCHEMAS:
        assert callable(getattr(reference, name))
        assert name in ops.FAKES


BAD_INDICES = [
    ("paged_attention", "block_tables", lambda t: t.fill_(99), r"block_tables holds 99, permitted are 0 to \d+$"),
    ("paged_attention", "block_tables", lambda t: t.fill_(-1), r"block_tables holds -1, permitted are 0 to"),
    ("paged_attention", "seq_lens", lambda t: t.fill_(9999), r"seq_lens holds 9999, permitted are 0 to"),
    ("paged_attention", "query_start", lambda t: t.add_(1), r"query_start=.* must hold \d rows from 0 to"),
    ("latent_attention", "block_tables", lambda t: t.fill_(99), r"block_tables holds 99"),
    ("cascade_attention", "shared_lens", lambda t: t.add_(3), r"shared_lens\[0\]=\d+ must be a multiple of"),
    ("cascade_attention", "shared_start", lambda t: t.add_(1), r"shared_start=.* must rise from 0 to"),
]


@pytest.mark.parametrize(("op", "argument", "spoil", "message"), BAD_INDICES)
def test_debug_mode_finds_an_index_out_of_range(
    op: str, argument: str, spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPASS_DEBUG", "1")
    kernel = getattr(torch.ops.kvpass, op)
    case = attention_case(5, op, "float32", "int8")
    kernel(**case.arguments)
    spoil(case.arguments[argument])
    with pytest.raises(InputError, match=rf"kvpass::{op}: {message}"):
        kernel(**case.arguments)


def test_debug_mode_finds_wrong_slots_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_DEBUG", "1")
    new, cache = torch.zeros(2, 1, 8), torch.zeros(3, 1, 4, 8)
    for slots, message in (([0, 12], r"slot_mapping holds 12, permitted are 0 to 11"), ([5, 5], "holds 5 twice")):
        with pytest.raises(InputError, match=rf"kvpass::write_cache: .*{message}"):
            torch.ops.kvpass.write_cache(new, new, cache, cache.clone(), torch.tensor(slots))
    for source, target, message in (([3], [0], "source holds 3"), ([0, 1], [2, 2], "target holds 2 twice")):
        with pytest.raises(InputError, match=rf"kvpass::copy_blocks: {message}"):
            torch.ops.kvpass.copy_blocks([cache], torch.tensor(source), torch.tensor(target))
    with pytest.raises(InputError, match=r"kvpass::gather_cache: block_tables holds 7, permitted are 0 to 2"):
        torch.ops.kvpass.gather_cache(cache, torch.tensor([[7]]), torch.tensor([2]), 8)


def test_debug_mode_lets_forgotten_blocks_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_DEBUG", "1")
    case = attention_case(11, "paged_attention", "float32", "float32")
    case.arguments |= {"window": 1, "tree_mask": None, "chunk": None, "bias": None}
    size, tables = case.arguments["key_cache"].shape[2], case.arguments["block_tables"]
    counts = case.arguments["query_start"].diff()
    for n, length in enumerate(case.arguments["seq_lens"].tolist()):
        tables[n, : (length - int(counts[n])) // size] = 10**9
    assert (tables[:, 0] == 10**9).any()
    torch.ops.kvpass.paged_attention(**case.arguments)


def test_arguments_are_checked_again_when_they_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(backends, "choose", lambda *_: lambda *args, **named: None)
    monkeypatch.setattr(backends, "check_indices", lambda *_: None)
    monkeypatch.delenv("KVPASS_DEBUG", raising=False)
    run = implementation_of("some_op", ("first", "second"), lambda *_, **__: checked.append(1))

    def checks(*args: Any, **named: Any) -> int:
        before = len(checked)
        run(*args, **named)
        return len(checked) - before

    rows = torch.zeros(4, 6)
    assert [checks(rows, 2), checks(rows + 1, 2), checks([rows], 2), checks([rows], 2)] == [1, 0, 1, 0]
    for other in (rows[:3], rows.t(), rows.double(), rows.t().contiguous().t()):
        assert [checks(other, 2), checks(other, 2)] == [1, 0]
    assert [checks(rows, 3), checks(rows, None), checks(rows, second=2), checks(rows, second=2)] == [1, 1, 1, 0]
    monkeypatch.setenv("KVPASS_BACKEND", "reference")
    assert [checks(rows, 2), checks(rows, 2)] == [1, 0]
    monkeypatch.setenv("KVPASS_DEBUG", "1")
    assert [checks(rows, 2), checks(rows, 2)] == [1, 1]
    monkeypatch.setenv("KVPASS_DEBUG", "0")
    assert checks(torch.zeros(3), 2) == 1
    for size in range(4, backends.CALLS_KEPT + 4):
        checks(torch.zeros(size), 2)
    assert checks(torch.zeros(3), 2) == 1, "only so many calls are remembered"


def test_an_implementation_names_the_arguments_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def remember(op: str, device: str, arguments: dict[str, Any]) -> Any:
        seen.update(arguments, device=device)
        return lambda *args, **kwargs: None

    monkeypatch.setattr(backends, "choose", remember)
    implementation_of("some_op", ("first", "second", "third"), lambda *_: None)(torch.zeros(1), 2)
    assert seen == {"first": torch.zeros(1), "second": 2, "device": "cpu"}
