"""How far a kernel may be from the truth when it rounds queries and weights no more coarsely than its cache is rounded.

A kernel that multiplies bytes, or pairs of bfloat16, has to round what it multiplies them with. The error that storing
the keys and values has made already is the measure of what that may cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.formats import format_of, unpack_slabs
from kvpass.kernels.settling import read_blocks, wide_view
from tests.kernels.random_cases import BOUNDS, Case, allowed_error
from tests.kernels.settled_cases import allowed_errors


def check_within_formats(case: Case, kernel: Callable[..., Any]) -> None:
    """Call ``kernel`` and compare with the bounds of the dtype plus the error that the formats imply."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        got = kernel(**case.arguments)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    outputs, wanted = got if isinstance(got, tuple) else (got,), case.wanted()
    score, value = implied_errors(case.arguments)
    rows = case.arguments["query"].shape[0] * case.arguments["query"].shape[1]
    for found, want, implied in zip(outputs, wanted, (value, score, 2 * rows * score), strict=False):
        relative, absolute = BOUNDS[found.dtype]
        torch.testing.assert_close(
            found.double(), want, rtol=relative, atol=absolute + implied, msg=lambda text: f"{case.told}\n{text}"
        )


def implied_errors(arguments: dict[str, Any]) -> tuple[float, float]:
    """The most that rounding keys and values into their formats can change a score, and an output."""
    key_error, _ = _rounding(arguments.get("key_cache", arguments.get("cache")), arguments, "key_format")
    value_error, largest = _rounding(arguments.get("value_cache", arguments.get("cache")), arguments, "value_format")
    score = arguments["scale"] * arguments["query"].double().abs().sum(-1).max().item() * key_error
    # weights whose scores are off by e are off by a factor of up to exp(2 e); no output is off by more than its range
    spread = min(2.0, float(torch.expm1(torch.tensor(2 * score))))
    return score, value_error + spread * largest


def _rounding(cache: Tensor, arguments: dict[str, Any], name: str) -> tuple[float, float]:
    """The largest error of an element of a cache, and the largest element."""
    form = format_of(cache, arguments.get(name, arguments.get("format")))
    if form.settles is not None:  # what is stored is exact; kernels round what they multiply it with
        blocks = torch.cat((torch.arange(len(cache)), -1 - torch.arange(len(wide_view(cache, form)))))
        numbers = read_blocks(cache, form, blocks).nan_to_num(0.0, 0.0, 0.0)
        return allowed_errors(numbers, form.name).max().item(), numbers.abs().max().item()
    numbers = unpack_slabs(cache, form).nan_to_num(0.0, 0.0, 0.0)
    error = 0.0 if form.name == "float32" else allowed_error(numbers, form.name).max().item()
    return error, numbers.abs().max().item()
