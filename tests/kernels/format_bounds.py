"""How far a call may be from the truth: what its formats imply, what its dtypes imply, and what each backend rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS, CacheFormat, format_of
from kvpass.kernels.formats.settling import read_blocks, wide_view
from tests.kernels.format_definitions import SATURATING, read_cache

BOUNDS = {  # relative, absolute; of the half precisions the final rounding, so sums must have been float32
    torch.float32: (3e-5, 3e-6),
    torch.float16: (2.0**-10, 2e-5),
    torch.bfloat16: (2.0**-8, 2e-5),
}


class Allowance(NamedTuple):
    """What an attention's results may be off by, beyond sums in float32 and the rounding of its outputs."""

    output: float = 0.0
    log_sum: float = 0.0
    mass: float = 0.0


class Rounding(NamedTuple):
    """What a backend rounds.

    Attributes:
        allow: gives what that may cost an attention, from its arguments.
        bfloat16: relative error of a number that is stored in bfloat16.
    """

    allow: Callable[[dict[str, Any]], Allowance]
    bfloat16: float = BOUNDS[torch.bfloat16][0]

    def bound(self, want: Tensor, dtype: torch.dtype, allowed: float = 0.0) -> Tensor:
        """Largest error of each number of ``want``, float64, where the result is of ``dtype``."""
        relative, absolute = BOUNDS[dtype]
        relative = self.bfloat16 if dtype is torch.bfloat16 else relative
        size = want.nan_to_num(0.0, 0.0, 0.0).abs()
        cancelled = 2e-6 * size.max().item() if size.numel() else 0.0
        return relative * size + max(absolute, cancelled) + allowed


def worst_part(found: Tensor, want: Tensor, bound: Tensor, told: str) -> float:
    """The largest error as a part of its bound; NaN is wrong wherever it is, infinities have to be the same.

    Raises:
        AssertionError: if an error is above its bound.
    """
    assert found.shape == want.shape, f"{told}\nshape {tuple(found.shape)}, not {tuple(want.shape)}"
    found, same = found.double(), found.double() == want
    error = torch.where(same, 0.0, (found - want).abs())
    wrong = ~(error <= bound)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{told}\n{int(wrong.sum())} of {wrong.numel()} numbers are off by more than their bounds: the first is "
            f"{found[place]} instead of {want[place]} at {place}, bound {bound[place]:.3g}"
        )
    return torch.where(error > 0, error / bound, 0.0).max().item() if error.numel() else 0.0


def implied_errors(arguments: dict[str, Any]) -> Allowance:
    """Of a kernel that rounds queries and weights no more coarsely than its caches are rounded.

    One that multiplies bytes, or pairs of bfloat16, has to round what it multiplies them with. The error that storing
    keys and values has made already is the measure of what that may cost. Errors of a row's elements are as good as
    independent: those of a product with it add up as their squares do.
    """
    query = arguments["query"]
    caches = (_cache_of(arguments, part) for part in ("key", "value"))
    (key_error, _), (value_error, largest) = (_stored_error(*cache, query.dtype) for cache in caches)
    score = arguments["scale"] * query.double().norm(dim=-1).max().item() * key_error
    # weights whose scores are off by e are off by a factor of up to exp(2 e); no output is off by more than its range
    spread = min(2.0, float(torch.expm1(torch.tensor(2 * score))))
    return Allowance(value_error + spread * largest, score, 2 * query.shape[0] * query.shape[1] * score)


def rounded_weights(arguments: dict[str, Any]) -> Allowance:
    """Of a kernel that rounds weights to the dtype of their dot, and takes float32 products from three of TF32."""
    query, (cache, form) = arguments["query"], _cache_of(arguments, "value")
    plain = query.dtype is torch.float32 or form.settles is not None
    unit = 2.0**-11 if form.bits <= 8 or query.dtype is torch.float16 else 2.0**-8
    _, largest = _stored_error(cache, form, query.dtype)
    return Allowance(((0.0 if plain else unit) + 2e-5) * largest, 3e-4, 3e-4)


ROUNDINGS = {
    "reference": Rounding(lambda _: Allowance()),
    "cpu": Rounding(implied_errors),
    "triton": Rounding(rounded_weights),
    "interpreter": Rounding(rounded_weights, bfloat16=2.0**-7),  # it cuts a float32 off where a GPU rounds it
}


def _cache_of(arguments: dict[str, Any], part: str) -> tuple[Tensor, CacheFormat]:
    """The cache of keys or values, which of a latent attention is the same, and its format."""
    cache = arguments.get(f"{part}_cache", arguments.get("cache"))
    return cache, format_of(cache, arguments.get(f"{part}_format", arguments.get("format")))


def _stored_error(cache: Tensor, form: CacheFormat, dtype: torch.dtype) -> tuple[float, float]:
    """What a kernel may round an element of a cache by, or its counterpart, and the largest element.

    That is a quarter of what the scaled formats have rounded it by. fp8 becomes bfloat16, which holds it, so that only
    its counterpart is rounded; so does k4v2, but two parts of bfloat16 stand for a counterpart of a query of another
    ``dtype``.
    """
    if form.settles is not None:
        blocks = torch.cat((torch.arange(len(cache)), -1 - torch.arange(len(wide_view(cache, form)))))
        numbers = read_blocks(cache, form, blocks).nan_to_num(0.0, 0.0, 0.0)
        rounded = allowed_error(numbers, "bfloat16").max().item()
        return rounded if dtype is torch.bfloat16 else rounded * 2.0**-8, numbers.abs().max().item()
    numbers = read_cache(cache, form.name).nan_to_num(0.0, 0.0, 0.0)
    largest = numbers.abs().max().item()
    if form.name == "float32":
        return 0.0, largest
    error = allowed_error(numbers, "bfloat16" if form.name in SATURATING else form.name).max().item()
    return error / 4 if form.scaled else error, largest


def allowed_error(rows: Tensor, name: str) -> Tensor:
    """Largest error that a format may make of each number of ``rows [..., D]``, float64; see :func:`rounding_error`."""
    rows = rows.double().abs()
    if FORMATS[name].scaled:
        return (rows.amax(-1, keepdim=True) / {"int8": 127, "int4": 7}[name] / 2 * 1.0001 + 1e-44).expand_as(rows)
    # half a unit in the last place, and half of the smallest number that there is
    bits, smallest = {
        "float32": (24, 0.0),
        "bfloat16": (8, 2.0**-133),
        "float16": (11, 2.0**-24),
        "fp8_e4m3": (4, 2.0**-9),
        "fp8_e5m2": (3, 2.0**-16),
    }[name]
    return rows * 2.0**-bits * 1.0001 + smallest / 2


def rounding_error(error: Tensor, name: str) -> Tensor:
    """Errors ``[..., D]`` in the sense of a format's bound: each by itself, or of int4 the RMS of its row.

    int4 may cut off its largest number where that makes all others better.
    """
    return error.square().mean(-1, keepdim=True).sqrt().expand_as(error) if name == "int4" else error.abs()
