"""Writing, norming, moving and gathering, in every format, against what the bytes have to be."""

from __future__ import annotations

import random

import pytest
import torch

from kvpass.kernels.reference import backend as reference
from tests.kernels.cache_cases import CHECKS
from tests.kernels.settled_cases import NAMES


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", CHECKS)
def test_the_reference_fills_and_moves_caches_as_it_says(op: str, name: str) -> None:
    for seed in range(8):
        other = random.Random(seed).choice(NAMES)
        CHECKS[op](getattr(reference, op), seed, name, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", CHECKS)
def test_a_kernel_that_does_too_little_or_too_much_is_noticed(op: str, name: str) -> None:
    def too_little(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros(1)

    def too_much(*args: torch.Tensor, **kwargs: object) -> object:
        result = getattr(reference, op)(*args, **kwargs)
        blocks = op in ("copy_blocks", "settle_blocks")
        caches = args[0] if blocks else [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
        for cache in caches:
            cache.view(torch.uint8)[-1, 0, -1, -1] ^= 1
            cache.view(torch.uint8)[0, 0, 0, 0] ^= 1
        return result * 1.01 if isinstance(result, torch.Tensor) else result

    for wrong in (too_little, too_much):
        with pytest.raises((AssertionError, RuntimeError)):
            for seed in range(4):
                CHECKS[op](wrong, seed, name, name)
