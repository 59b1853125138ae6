"""Compilers keep the ops, their order and their writes: torch.compile with dynamic shapes, and AOTInductor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.tiny_attention import TinyAttention, export_tiny, tiny_step

Compiled = Callable[..., Tensor]


def check(compiled: Compiled, module: nn.Module, formats: tuple[str, str]) -> None:
    """Steps of several shapes write and return what the module itself does."""
    for lengths in ([9, 5, 6], [3, 17], [1, 1, 1, 1]):
        arguments = tiny_step(lengths, seed=sum(lengths), formats=formats)
        expected = copy.deepcopy(arguments)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), module(*expected))
        for cache, wanted in zip(arguments[1:3], expected[1:3], strict=True):
            assert not torch.equal(cache.view(torch.uint8), torch.full_like(cache.view(torch.uint8), 255))
            torch.testing.assert_close(cache, wanted, equal_nan=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_serves_every_shape_with_one_graph(backend: str) -> None:
    module = TinyAttention("float32", "int8")
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
    check(compiled, module, ("float32", "int8"))


@pytest.mark.slow
def test_aot_inductor_packages_the_ops(tmp_path: Path) -> None:
    module = TinyAttention("int8", "float32")
    package = torch._inductor.aoti_compile_and_package(
        export_tiny(module, ("int8", "float32")), package_path=str(tmp_path / "tiny.pt2")
    )
    check(torch._inductor.aoti_load_package(package), module, ("int8", "float32"))
