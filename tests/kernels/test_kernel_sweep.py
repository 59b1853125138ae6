"""The sweep's own parts: what it draws, and that calls on another device, or on threads, are the same calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.kernel_sweep import TURNS, draw, on_device, on_threads, run_case
from kvpass.kernels.reference import backend as reference
from tests.kernels.cache_cases import CHECKS
from tests.kernels.format_bounds import ROUNDINGS
from tests.kernels.random_cases import ATTENTIONS, DIMS, SIZES, attention_case
from tests.kernels.settled_cases import NAMES


def test_every_op_meets_every_format_head_dim_block_size_and_feature() -> None:
    drawn = [draw(seed, None, None) for seed in range(len(TURNS) * 30)]
    for op in (*ATTENTIONS, *CHECKS):
        assert {name for each, formats in drawn if each == op for name in formats} == set(NAMES), op
    met = Counter[str]()
    for seed in range(300):
        case = attention_case(seed, "paged_attention", "float32", "float32").arguments
        met.update(name for name, value in case.items() if value is not None)
        met[f"D {case['query'].shape[2]}"] += 1
        met[f"P {case['key_cache'].shape[2]}"] += 1
        met["D != Dv"] += case["key_cache"].shape[3] != case["value_cache"].shape[3]
        met["bias by pair"] += case["bias"] is not None and case["bias"].dim() == 3
    features = ("softcap", "window", "slopes", "sinks", "bias", "chunk", "tree_mask", "D != Dv", "bias by pair")
    wanted = [*features, *(f"D {dim}" for dim in DIMS), *(f"P {size}" for size in SIZES)]
    assert not [name for name in wanted if not met[name]]


@pytest.mark.parametrize("op", [*ATTENTIONS, *CHECKS])
def test_calls_on_another_device_are_checked_on_this_one(op: str) -> None:
    kernel = getattr(reference, op)
    assert run_case(4, op, ("int8", "int8"), on_device(kernel, "cpu"), ROUNDINGS["reference"]) <= 1

    def lost(*arguments: object, **named: object) -> object:
        """Works on copies, and forgets what it wrote there."""
        found = on_device(kernel, "cpu")(*torch.utils._pytree.tree_map(_copied, arguments), **named)
        return found if found is None else torch.utils._pytree.tree_map(lambda x: x * 1.5 + 1, found)

    with pytest.raises(AssertionError):
        for seed in range(3):
            run_case(seed, op, ("int8", "int8"), lost, ROUNDINGS["reference"])


def test_threads_differ_from_case_to_case_and_are_as_before_after_it() -> None:
    before = torch.get_num_threads()
    assert {on_threads(torch.get_num_threads, seed)() for seed in range(20)} == {1, 2, 4}
    with pytest.raises(ZeroDivisionError):
        on_threads(lambda: 1 // 0, 0)()
    assert torch.get_num_threads() == before


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
