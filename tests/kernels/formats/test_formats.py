"""Cache formats: every row of the table takes exactly the bytes that it claims, and keeps numbers within its bound."""

from __future__ import annotations

import pytest
import torch

from kvpass.config import CACHE_DTYPES, CacheConfig
from kvpass.errors import ConfigError, InputError
from kvpass.kernels.formats.cache_formats import (
    FORMATS,
    allocate_cache,
    cache_bytes_per_token,
    find_format,
    format_for_dtype,
    format_of,
    pack_slabs,
    quantise_rows,
    unpack_slabs,
)
from kvpass.kernels.formats.fitted_codes import CUTS, fit_codes
from kvpass.types import CacheSpec
from tests.kernels.format_bounds import allowed_error, rounding_error
from tests.kernels.settled_cases import ROWS

WIDTHS = {"int8": 24 + 4, "int4": 24 // 2 + 4}  # stored width of 24 numbers; that of the float formats is 24


def spec(key_format: str, value_format: str) -> CacheSpec:
    return CacheSpec("layers.0", 3, 24, 8, key_format, value_format)


@pytest.mark.parametrize("name", ROWS)
def test_bytes_per_token_is_what_one_token_takes(name: str) -> None:
    cache = FORMATS[name].allocate(7, 3, 16, 24, "cpu")
    assert cache.shape == (7, 3, 16, WIDTHS.get(name, 24))
    assert cache.nbytes == 7 * 16 * FORMATS[name].bytes_per_token(3, 24)
    assert FORMATS[name].row_width(cache.shape[3]) == 24


@pytest.mark.parametrize("key_format", ROWS)
@pytest.mark.parametrize("value_format", ROWS)
def test_a_cache_takes_exactly_its_bytes_and_starts_as_zeros(key_format: str, value_format: str) -> None:
    cache = spec(key_format, value_format)
    keys, values = allocate_cache(cache, num_blocks=5, block_size=32, device="cpu")
    assert keys.nbytes + values.nbytes == 5 * 32 * cache_bytes_per_token(cache)
    assert keys.untyped_storage().nbytes() + values.untyped_storage().nbytes() == keys.nbytes + values.nbytes
    for tensor, name, dim in ((keys, key_format, 24), (values, value_format, 8)):
        assert tensor.is_contiguous()
        numbers = unpack_slabs(tensor, FORMATS[name])
        assert numbers.shape == (5, 3, 32, dim)
        assert not numbers.any()


@pytest.mark.parametrize("block_size", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_numbers_come_back_within_the_bound_of_the_format(name: str, dtype: torch.dtype, block_size: int) -> None:
    generator = torch.Generator().manual_seed(len(name))
    sizes = torch.tensor([1.0, 1e-4, 30.0, 0.0])[:, None, None]
    rows = (torch.randn(4, block_size, 22, generator=generator) * sizes).to(dtype)
    if name == "float16":
        rows = rows.clamp(-6e4, 6e4)
    slabs = pack_slabs(rows, FORMATS[name])
    assert slabs.shape == (4, block_size, FORMATS[name].stored_width(22))
    numbers = unpack_slabs(slabs, FORMATS[name])
    assert numbers.dtype is torch.float32
    assert (rounding_error((numbers - rows.float()).double(), name) <= allowed_error(rows, name)).all()
    assert not numbers[3].any()


def test_the_bytes_of_int8_and_int4_are_those_of_the_layout() -> None:
    rows = torch.tensor([[1.27, -1.27, 0.02, 0.0], [0.0, 0.0, 0.0, 0.0], [7.0, -7.0, 3.5, -2.5]])
    slab = pack_slabs(rows, FORMATS["int8"]).flatten()
    assert slab.view(torch.int8)[:12].tolist() == [127, -127, 2, 0, 0, 0, 0, 0, 127, -127, 64, -45]
    assert slab[12:].view(torch.float32).tolist() == [*(rows.abs().amax(1) / 127).tolist()]
    rows = torch.tensor([[1.0, -2.75, -2.0, 0.25], [0.0, 0.0, 0.0, 0.0], [-4.0, 3.5, 3.0, -3.5]])
    slab = pack_slabs(rows, FORMATS["int4"]).flatten()
    # dim j below, dim j + 2 above; the first and the last row have both ends on a grid of 16 steps
    assert slab[:2].tolist() == [(7 + 8) | (-5 + 8) << 4, (-8 + 8) | (4 + 8) << 4]
    assert slab[2:6].tolist() == [8 | 8 << 4, 8 | 8 << 4, (-8 + 8) | (6 + 8) << 4, (7 + 8) | (-7 + 8) << 4]
    assert slab[6:].clone().view(torch.bfloat16).tolist() == [0.25, -0.75, 0.0, 0.0, 0.5, 0.0]


def test_int4_takes_the_best_scale_and_offset_of_those_tried() -> None:
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    rows[::7, 3] *= 20
    rows[::5] += 3
    codes, scales, offsets = fit_codes(rows)
    assert scales.min() > 0
    assert set(codes.unique().tolist()) == set(range(-8, 8))
    error = (rows - codes * scales[:, None].float() - offsets[:, None].float()).double().square().sum(-1)
    best = torch.full_like(error, torch.inf)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    for start in (low + cut * (high - low) for cut in CUTS):
        for end in (high - cut * (high - low) for cut in CUTS):
            tried = ((rows - start) / (end - start) * 15 - 8).round().clamp(-8, 7).double()
            line = torch.stack((tried, torch.ones_like(tried)), -1)
            left = rows - (line @ torch.linalg.lstsq(line, rows.double().unsqueeze(-1)).solution)[..., 0]
            best = torch.minimum(best, left.square().sum(-1))
    rounding = (8 * scales.float() + offsets.float().abs()).double().square() * 2**-16 * 32  # to bfloat16, at worst
    assert (error <= best * 1.001 + rounding).all()
    assert error.sum() < 1.01 * best.sum()
    assert ((error / 32).sqrt() <= (high - low)[:, 0] / 30 + (rounding / 32).sqrt()).all()
    symmetric = rows.abs().amax(-1, keepdim=True) / 7
    plain = (rows - (rows / symmetric).round() * symmetric).double().square().sum(-1)
    assert error.sum() < 0.65 * plain.sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_what_is_not_finite_stays_visible(name: str, value: float) -> None:
    rows = torch.ones(2, 8)
    rows[1, 3] = value
    numbers = unpack_slabs(pack_slabs(rows, FORMATS[name]), FORMATS[name])
    assert torch.equal(numbers[0], rows[0])
    assert not numbers[1, 3].isfinite()


@pytest.mark.parametrize(("name", "largest"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_fp8_saturates(name: str, largest: float) -> None:
    stored, scales = quantise_rows(torch.tensor([3e38, -3e38, largest * 1.01, 1.0]), FORMATS[name])
    assert scales is None
    assert stored.float().tolist() == [largest, -largest, largest, 1.0]


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if not row.coded])
def test_a_format_keeps_its_own_dtype_unchanged(name: str) -> None:
    row = FORMATS[name]
    assert row.name == name
    assert row.bits == torch.empty(1, dtype=row.dtype).nbytes * 8
    assert format_for_dtype(row.dtype) == name
    assert format_of(torch.empty(3, dtype=row.dtype), None) == FORMATS[name] == format_of(
        torch.empty(3, dtype=row.dtype), name
    )  # fmt: skip


def test_every_cache_dtype_of_the_config_is_a_format() -> None:
    assert set(CACHE_DTYPES) - {"auto", "k4v2"} == set(ROWS)
    assert CacheConfig(dtype="k4v2").formats(2) == (("k4", "v2"), ("k4", "v2"))


def test_an_unknown_format_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'int3' does not exist: choose one of float32, bfloat16, float16"):
        find_format("int3")
    with pytest.raises(ConfigError, match=r"int3"):
        cache_bytes_per_token(spec("int3", "float32"))
    with pytest.raises(ConfigError, match=r"no cache format keeps float64 unchanged"):
        format_for_dtype(torch.float64)
    with pytest.raises(ConfigError, match=r"int4 needs an even head dim, not 7"):
        FORMATS["int4"].stored_width(7)


def test_a_cache_that_is_not_in_its_format_is_an_error() -> None:
    with pytest.raises(InputError, match=r"a uint8 cache needs the name of its format: one of int8, int4"):
        format_of(torch.zeros(3, dtype=torch.uint8), None)
    with pytest.raises(InputError, match=r"a cache of format int8 is a tensor of uint8, not of float32"):
        format_of(torch.zeros(3), "int8")
