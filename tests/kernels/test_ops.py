"""The ops as torch sees them: schemas, shapes, export, dead code, gradients and autocast."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from kvpass.kernels import ops
from kvpass.kernels.reference import naive
from tests.kernels.tiny_attention import PAGED, WRITE, TinyAttention, export_tiny, tiny_step

DENSE = torch.ops.kvpass.dense_attention.default
WRITING = ("write_cache", "copy_blocks", "settle_blocks", "norm_rotary_write")


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_schema_is_the_one_declared(name: str) -> None:
    schema = torch._C.parse_schema(f"kvpass::{name}{ops.SCHEMAS[name]}")
    op = getattr(torch.ops.kvpass, name).default
    assert str(op._schema) == str(schema)
    assert op._schema.is_mutable == (name in WRITING)


def test_importing_again_changes_nothing() -> None:
    importlib.reload(ops)
    twin = importlib.util.spec_from_file_location("twin_of_ops", ops.__file__)
    assert twin is not None
    assert twin.loader is not None
    twin.loader.exec_module(importlib.util.module_from_spec(twin))
    assert torch.ops.kvpass.write_cache.default is WRITE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.zeros(1, 1, 5, 7)], ids=["no bias", "bias"])
def test_dense_attention_passes_opcheck(bias: Tensor | None, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, *shape).to(dtype) for shape in ((4, 5, 8), (2, 7, 8), (2, 7, 6)))
    torch.library.opcheck(DENSE, (query, key, value, bias, 0.5), {"softcap": 2.0, "sinks": torch.zeros(4)})


def test_write_cache_passes_opcheck() -> None:
    new, caches = torch.randn(3, 2, 8), torch.zeros(2, 5, 2, 4, 8)
    torch.library.opcheck(WRITE, (new, new, caches[0].clone(), caches[1].clone(), torch.tensor([4, 11, 0])))


@pytest.mark.parametrize("rich", [False, True])
def test_paged_attention_passes_opcheck(rich: bool, random_step: Callable[..., Any]) -> None:
    step = random_step([9, 6], [1, 4], block_size=4)
    for cache in (step.key_cache, step.value_cache):
        cache.nan_to_num_(0.0, 0.0, 0.0)  # opcheck compares its arguments before and after
    extra = {"softcap": 2.0, "window": 5, "slopes": torch.rand(4), "sinks": torch.zeros(4), "bias": torch.zeros(1, 9)}
    step.attend(lambda *arguments: torch.library.opcheck(PAGED, arguments, extra if rich else {}), 0.3)


def test_fakes_give_the_shapes_and_dtypes_of_the_ops(random_step: Callable[..., Any]) -> None:
    step = random_step([9, 6], [1, 4], block_size=4, dims=(8, 6), dtype=torch.float16, cache_dtype=torch.bfloat16)
    real = step.attend(PAGED, 0.3)
    with FakeTensorMode() as mode:
        fake = step.attend(lambda *arguments: PAGED(*tree_map_only(Tensor, mode.from_tensor, arguments)), 0.3)
        dense = DENSE(*(torch.empty(2, h, 5, d, dtype=torch.float16) for h, d in ((4, 8), (2, 8), (2, 6))), None, 1.0)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert (dense.shape, dense.dtype) == ((2, 4, 5, 6), torch.float16)


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        (DENSE, ((1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)), "4 query heads cannot be grouped over 3 key and 3"),
        (DENSE, ((1, 4, 5, 8), (1, 2, 5, 6), (1, 2, 5, 6)), "query has head dim 8, key 6"),
        (PAGED, ((5, 4, 8), (9, 2, 4, 8), (9, 4, 4, 8)), "4 query heads cannot be grouped over 2 key and 4"),
        (PAGED, ((5, 4, 8), (9, 2, 4, 6), (9, 2, 4, 6)), "query has head dim 8, key cache 6"),
        (WRITE, ((5, 4, 8), (5, 2, 6), (9, 4, 4, 8), (9, 4, 4, 6)), "cannot write"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_when_traced(op: Any, shapes: Any, message: str) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(shape) for shape in shapes]
        whole = torch.zeros(3, dtype=torch.int64)
        rest = {DENSE: (None, 1.0), PAGED: (whole[:, None], whole, whole, 1.0), WRITE: (whole,)}[op]
        with pytest.raises(RuntimeError, match=message):
            op(*tensors, *rest)


def test_an_exported_module_writes_and_reads_its_cache() -> None:
    module = TinyAttention()
    exported = export_tiny(module)
    for program in (exported, exported.run_decompositions({})):
        for lengths in ([9, 5, 6], [3, 17]):
            arguments = tiny_step(lengths, seed=sum(lengths))
            expected = copy.deepcopy(arguments)
            with torch.no_grad():
                want = module(*expected)
                got = program.module()(*arguments)
            torch.testing.assert_close(got, want)
            for cache, expected_cache in zip(arguments[1:3], expected[1:3], strict=True):
                torch.testing.assert_close(cache, expected_cache, equal_nan=True)
                assert cache.isfinite().any()


def test_a_functionalised_graph_says_that_the_caches_are_mutated() -> None:
    signature = export_tiny(TinyAttention()).run_decompositions({}).graph_signature
    assert set(signature.user_inputs_to_mutate.values()) == {"key_cache", "value_cache"}


def test_dead_code_elimination_keeps_the_write() -> None:
    graph = torch.fx.Graph()
    arguments = [graph.placeholder(name) for name in ("key", "value", "key_cache", "value_cache", "slots")]
    graph.call_function(WRITE, tuple(arguments))
    unused = graph.call_function(torch.ops.aten.neg.default, (arguments[0],))
    graph.output(arguments[1])
    graph.eliminate_dead_code()
    assert [node.target for node in graph.find_nodes(op="call_function", target=WRITE)] == [WRITE]
    assert unused not in graph.nodes


@pytest.mark.parametrize("leaf", [False, True])
def test_nothing_is_recorded_for_gradients(leaf: bool, random_step: Callable[..., Any]) -> None:
    step = random_step([9, 6], [1, 4], block_size=4)
    weight = nn.Parameter(torch.ones(5, 4, 16))
    step.query = query = weight if leaf else step.query * weight
    assert not step.attend(PAGED, 0.3).requires_grad
    assert not DENSE(query[None], query[None], query[None], None, 0.3).requires_grad
    WRITE(query[:2, :2], query[:2, :2], step.key_cache, step.value_cache, torch.tensor([0, 7]))
    assert not step.key_cache.requires_grad
    assert step.key_cache.grad_fn is None


def test_autocast_does_not_change_the_result(random_step: Callable[..., Any]) -> None:
    step = random_step([9, 6], [1, 4], block_size=4)
    want = step.attend(naive.paged_attention, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step.attend(PAGED, 0.3)
        dense = DENSE(step.query[None], step.query[None], step.query[None], None, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(dense, DENSE(step.query[None], step.query[None], step.query[None], None, 0.3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes_are_served(mode: Callable[[], Any], random_step: Callable[..., Any]) -> None:
    step = random_step([9, 6], [1, 4], block_size=4)
    want = step.attend(naive.paged_attention, 0.3)
    with mode():
        torch.testing.assert_close(step.attend(PAGED, 0.3).double(), want, rtol=2e-5, atol=2e-6)
    # What was derived within the mode serves outside it as well.
    torch.testing.assert_close(step.attend(PAGED, 0.3).double(), want, rtol=2e-5, atol=2e-6)
