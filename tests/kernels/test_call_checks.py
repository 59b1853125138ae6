"""Calls that cannot be right are refused by whatever backend serves them, before memory is touched, and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from kvpass.errors import ConfigError, InputError
from kvpass.kernels import ops
from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.reference import naive

KVPASS = torch.ops.kvpass
Change = Callable[[Any], Any]


def good_call(op: str) -> dict[str, Any]:
    """A call that every backend serves: heads 4/2 of 32, values of 24, blocks of 16."""
    assert op in ops.SCHEMAS
    caches = {"key_cache": torch.randn(6, 2, 16, 32), "value_cache": torch.randn(6, 2, 16, 24)}
    new = {"key": torch.randn(3, 2, 32), "value": torch.randn(3, 2, 24), "slot_mapping": torch.tensor([0, 5, 20])}
    tables = {"block_tables": torch.tensor([[3, 1], [2, 0]]), "seq_lens": torch.tensor([18, 2])}
    attention = {"query": torch.randn(3, 4, 32), "query_start": torch.tensor([0, 2, 3]), "scale": 0.2, **tables}
    settled = [FORMATS[name].allocate(4, 2, 16, 32, "cpu", 2) for name in ("k4", "v2")]
    blocks = {"source": torch.tensor([-1]), "target": torch.tensor([0])}
    calls: dict[str, dict[str, Any]] = {
        "paged_attention": {**attention, **caches},
        "paged_attention_stats": {**attention, **caches},
        "latent_attention": {**attention, "cache": torch.randn(6, 1, 16, 32), "value_dim": 24},
        "cascade_attention": {
            **attention, **caches, "shared_start": torch.tensor([0, 2]), "shared_lens": torch.tensor([0])
        },
        "write_cache": {**caches, **new},
        "norm_rotary_write": {
            **caches, **new, "query": torch.randn(3, 4, 32), "eps": 1e-6,
            **dict.fromkeys(("query_weight", "key_weight", "cos", "sin")),
        },
        "gather_cache": {"cache": caches["key_cache"], "width": 32, **tables},
        "settle_blocks": {"caches": settled, "formats": ["k4", "v2"], **blocks},
    }  # fmt: skip
    return calls[op]


WRONG: list[tuple[str, str, Change, str]] = [
    # a backend that trusts them would read, or write, outside of its memory
    ("paged_attention", "value_cache", lambda t: t[:3], "value_cache have the same blocks, but there are 6, 3"),
    ("write_cache", "value_cache", lambda t: t[:1], "value_cache have the same blocks, but there are 6, 1"),
    ("cascade_attention", "value_cache", lambda t: t.reshape(6, 2, 8, 48), "the same block size, but there are 16, 8"),
    ("paged_attention", "slopes", lambda _: torch.ones(3), r"slopes is \(3,\): it must hold one number per query head"),
    ("latent_attention", "sinks", lambda _: torch.ones(1, 4), r"sinks is \(1, 4\): it must hold one number per"),
    ("cascade_attention", "bias", lambda _: torch.ones(3, 40), r"bias is \(3, 40\): permitted are \[1 | 4, L\] and"),
    ("paged_attention", "bias", lambda _: torch.ones(40), r"bias is \(40,\): permitted are"),
    ("paged_attention_stats", "bias", lambda _: torch.ones(1, 40, 20), r"a bias .* is square, but there are 40, 20"),
    ("paged_attention", "tree_mask", lambda _: torch.ones(3, dtype=torch.bool), r"tree_mask has 1 dims: it must be \["),
    ("gather_cache", "seq_lens", lambda t: t[:1], "seq_lens have a row per sequence, but there are 2, 1"),
    # dtypes that nothing computes with
    ("paged_attention", "query", lambda t: t.int(), "query is torch.int32: permitted are torch.float32"),
    ("write_cache", "key", lambda t: t.long(), "key is torch.int64: permitted are torch.float32"),
    ("latent_attention", "slopes", lambda _: torch.ones(4, dtype=torch.int64), "slopes is torch.int64: permitted are"),
    ("norm_rotary_write", "query", lambda t: t.to(torch.complex64), "query is torch.complex64: permitted are"),
    ("cascade_attention", "shared_lens", lambda t: t.int(), "shared_lens is torch.int32: it must be torch.int64"),
    # ranks
    ("paged_attention", "query", lambda t: t.flatten(1), r"query has 2 dims: it must be \[T, Hq, D\]"),
    ("write_cache", "value", lambda t: t.flatten(1), r"value has 2 dims: it must be \[T, Hkv, D\]"),
    ("latent_attention", "cache", lambda t: t.flatten(2), r"cache has 3 dims: it must be \[B, Hkv, P, W\]"),
    ("paged_attention_stats", "seq_lens", lambda t: t[None], r"seq_lens has 2 dims: it must be \[N\]"),
    # numbers that mean nothing
    ("paged_attention", "softcap", lambda _: 0.0, "softcap=0.0 must be a number other than 0"),
    ("cascade_attention", "softcap", lambda _: float("nan"), "softcap=nan must be a number other than 0"),
    ("latent_attention", "chunk", lambda _: 0, "chunk=0 must be at least 1"),
    # formats
    ("paged_attention", "value_format", lambda _: "int3", "value_cache: cache format 'int3' does not exist: choose"),
    ("write_cache", "key_format", lambda _: "int8", "key_cache: a cache of format int8 is a tensor of uint8"),
    ("settle_blocks", "caches", lambda c: [c[0], torch.ones(4, 2, 16, 8)], r"caches\[1\]: a cache of format v2"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize(
    ("op", "argument", "change", "message"), WRONG, ids=lambda part: part if isinstance(part, str) else ""
)
def test_what_cannot_be_right_is_refused_when_run_and_when_traced(
    op: str, argument: str, change: Change, message: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("KVPASS_BACKEND", backend)
    arguments = good_call(op)
    getattr(KVPASS, op)(**arguments)
    wrong = arguments | {argument: change(arguments.get(argument))}
    written = [wrong[name].clone() for name in ("key_cache", "value_cache") if name in wrong]
    with pytest.raises((InputError, ConfigError), match=rf"^kvpass::{op}.*{message}"):
        getattr(KVPASS, op)(**wrong)
    for before, name in zip(written, ("key_cache", "value_cache"), strict=False):
        assert torch.equal(before, wrong[name]), f"{name} was written before the call was refused"
    with FakeTensorMode() as mode, pytest.raises((InputError, ConfigError, RuntimeError), match=message):
        getattr(KVPASS, op)(**tree_map_only(Tensor, mode.from_tensor, wrong))


@pytest.mark.parametrize("backend", ["", "reference"])
def test_what_only_the_kernels_find_names_the_op(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_BACKEND", backend)
    wrong = {
        "seq_lens": torch.tensor([40, 2]),
        "query_start": torch.tensor([0, 2, 4]),
        "bias": torch.zeros(1, 10),
        "tree_mask": torch.ones(3, 1, dtype=torch.bool),
    }
    for op in ("paged_attention", "paged_attention_stats"):
        for name, value in wrong.items():
            with pytest.raises(InputError, match=rf"^kvpass::{op}: "):
                getattr(KVPASS, op)(**good_call(op) | {name: value})


def test_a_cache_that_is_not_contiguous_or_elsewhere_is_refused() -> None:
    arguments = good_call("paged_attention")
    strided = arguments | {"key_cache": torch.zeros(6, 16, 2, 32).transpose(1, 2)}
    with pytest.raises(
        InputError, match=r"^kvpass::paged_attention: key_cache has strides \(1024, 32, 64, 1\): it must be"
    ):
        KVPASS.paged_attention(**strided)
    kernel = ops.implementation_of(
        "paged_attention", ops.argument_names("paged_attention"), ops.FAKES["paged_attention"]
    )
    elsewhere = arguments | {"value_cache": arguments["value_cache"].to("meta")}
    with pytest.raises(
        InputError, match=r"^kvpass::paged_attention: value_cache is on meta; it must be on cpu, where q"
    ):
        kernel(**elsewhere)


def test_a_softcap_below_zero_is_the_same_as_above() -> None:
    arguments = good_call("paged_attention") | {"softcap": -2.0}
    numbers = {name: arguments[name].double() for name in ("key_cache", "value_cache")}
    want = naive.paged_attention(**arguments | numbers)
    torch.testing.assert_close(KVPASS.paged_attention(**arguments).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.tensor([-99])}, r"source holds -99, permitted are -\d+ to \d+"),
        ({"target": torch.tensor([99])}, r"target holds 99, permitted are -\d+ to \d+"),
        ({"source": torch.tensor([-1, -2]), "target": torch.tensor([0, 0])}, r"target holds 0 twice, all must differ"),
    ],
)
def test_debug_mode_finds_blocks_that_cannot_settle(
    change: dict[str, Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPASS_DEBUG", "1")
    monkeypatch.setenv("KVPASS_BACKEND", "reference")
    KVPASS.settle_blocks(**good_call("settle_blocks"))
    with pytest.raises(InputError, match=rf"^kvpass::settle_blocks: {message}"):
        KVPASS.settle_blocks(**good_call("settle_blocks") | change)
