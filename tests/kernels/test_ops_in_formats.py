"""The ops with formats and rarer features, as torch sees them: shapes, mutation, export, functionalisation, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import FORMATS, pack_slabs
from kvpass.kernels.formats.settling import wide_view
from tests.kernels.random_cases import ATTENTIONS, attention_case
from tests.kernels.tiny_attention import TinyAttention, export_tiny, tiny_step

KVPASS = torch.ops.kvpass
MIXED = ("int8", "int4")


def slabs(name: str, dim: int = 8) -> Tensor:
    return pack_slabs(torch.randn(5, 2, 16, dim, generator=torch.Generator().manual_seed(dim)), FORMATS[name])


def settling(name: str, dim: int = 16) -> Tensor:
    """A cache of three narrow blocks and three wide ones."""
    cache = FORMATS[name].allocate(3, 2, 16, dim, "cpu", 3).zero_()
    wide_view(cache, FORMATS[name])[-3:] = torch.randn(
        3, 2, 16, dim, generator=torch.Generator().manual_seed(dim)
    ).bfloat16()
    return cache


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One call of every op that takes formats or moves blocks."""
    new, slots = torch.randn(3, 2, 8), torch.tensor([4, 71, 0])
    formats = {"key_format": "int8", "value_format": "int4"}
    step = (torch.tensor([[3, 1], [2, 0]]), torch.tensor([18, 2]), torch.tensor([0, 2, 3]))
    paged = (torch.randn(3, 4, 8), slabs("int8"), slabs("int4"), *step)
    tree, angles = torch.ones(3, 2, dtype=torch.bool).tril(), torch.rand(3, 4)
    return {
        "write_cache": ((new, new, slabs("int8"), slabs("int4"), slots), formats),
        "norm_rotary_write": (
            (new.repeat(1, 2, 1), new, new, slabs("int8"), slabs("int4"), slots, None, torch.ones(8), 1e-6),
            {"cos": angles, "sin": angles, **formats},
        ),
        "paged_attention": ((*paged, 0.3), {"tree_mask": tree, "chunk": 8, **formats}),
        "paged_attention_stats": ((*paged, 0.3), {"sinks": torch.zeros(4), "mass": True, **formats}),
        "latent_attention": ((paged[0], slabs("int8")[:, :1].clone(), *step, 0.3, 6), {"format": "int8"}),
        "cascade_attention": ((*paged, torch.tensor([0, 1, 2]), torch.tensor([16, 0]), 0.3), formats),
        "gather_cache": ((slabs("int4"), *step[:2], 8), {"format": "int4"}),
        "copy_blocks": (([slabs("int8"), slabs("int4")], torch.tensor([1, 0]), torch.tensor([3, 1])), {}),
        "settle_blocks": (
            ([settling("k4"), settling("v2")], ["k4", "v2"], torch.tensor([-1, -3]), torch.tensor([2, -2])),
            {},
        ),
    }


@pytest.mark.parametrize("op", calls())
def test_the_op_passes_opcheck(op: str) -> None:
    arguments, named = calls()[op]
    torch.library.opcheck(getattr(KVPASS, op).default, arguments, named)


@pytest.mark.parametrize("op", ATTENTIONS)
def test_fakes_give_the_shapes_of_random_calls(op: str) -> None:
    for seed in range(8):
        case = attention_case(seed, op, "int4", "fp8_e4m3")
        real = tree_leaves(getattr(KVPASS, op)(**case.arguments))
        with FakeTensorMode() as mode:
            given = {k: tree_map_only(Tensor, mode.from_tensor, v) for k, v in case.arguments.items()}
            fake = tree_leaves(getattr(KVPASS, op)(**given))
        assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_an_exported_module_with_quantised_caches_writes_and_reads_them() -> None:
    module = TinyAttention(*MIXED).eval()
    program = export_tiny(module, MIXED).run_decompositions({})
    assert set(program.graph_signature.user_inputs_to_mutate.values()) == {"key_cache", "value_cache"}
    arguments, expected = (tiny_step([3, 17, 6, 1], 1, MIXED) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*arguments), module(*expected))
    assert torch.equal(arguments[1], expected[1])
    assert torch.equal(arguments[2], expected[2])


def test_a_compiled_module_with_quantised_caches_is_the_same_at_every_shape() -> None:
    module = TinyAttention(*MIXED).eval()
    compiled = torch.compile(module, backend="aot_eager", dynamic=True, fullgraph=True)
    for lengths in ([9, 5, 6], [3, 17]):
        arguments, expected = (tiny_step(lengths, formats=MIXED) for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), module(*expected))
        assert torch.equal(arguments[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_format": None}, "a uint8 cache needs the name of its format"),
        ({"key_format": "float16"}, "a cache of format float16 is a tensor of float16, not of uint8"),
        ({"key_format": "int4"}, "query has head dim 8, key cache 16"),
        (
            {"tree_mask": torch.ones(2, 2, dtype=torch.bool)},
            "tree_mask and query have one row per token, but there are 2, 3",
        ),
        ({"tree_mask": torch.ones(3, 2)}, "tree_mask is torch.float32: it must be torch.bool"),
    ],
)
def test_formats_and_masks_that_do_not_fit_are_an_error_when_run_and_when_traced(
    change: dict[str, Any], message: str
) -> None:
    arguments, named = calls()["paged_attention"]
    with pytest.raises((InputError, RuntimeError), match=message):
        KVPASS.paged_attention(*arguments, **named | change)
    with FakeTensorMode() as mode, pytest.raises((InputError, RuntimeError), match=message):
        given = tree_map_only(Tensor, mode.from_tensor, (arguments, named | change))
        KVPASS.paged_attention(*given[0], **given[1])


def test_what_only_the_numbers_show_is_an_error_when_run() -> None:
    arguments, named = calls()["paged_attention"]
    with pytest.raises(InputError, match=r"tree_mask has 1 columns, but a sequence has 2 tokens in this step"):
        KVPASS.paged_attention(*arguments, **named | {"tree_mask": torch.ones(3, 1, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"chunk=0 must be at least 1"):
        KVPASS.paged_attention(*arguments, **named | {"chunk": 0})
