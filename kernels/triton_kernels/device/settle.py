"""Blocks that settle and widen: see :mod:`kvpass.kernels.formats.settling`, whose arithmetic this is.

Two launches per tensor, since blocks may trade places: :func:`settle_kernel` reads all blocks, as what they are to
become, into a tensor between, and :func:`place_kernel` puts them where they belong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.settled import load_part, load_token_scales
from kvpass.kernels.triton_kernels.device.tiles import round_half_even


@triton.jit
def to_bfloat16(x, UP: tl.constexpr):
    """Positive float32 numbers rounded to those of bfloat16: to the nearest, or UP. In integers: the same anywhere."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0xFFFF if UP else 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Whether all of a row is, int32 ``[R]`` of 0 and 1."""
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1)


@triton.jit
def channel_units(largest, overall):
    """The bytes of channels whose largest magnitudes are ``largest``, and the numbers that they stand for."""
    relative = tl.div_rn(largest, tl.where(overall > 0, overall, 1.0))
    code = ((relative.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - 761
    code = tl.minimum(tl.maximum(code, 0), 255)
    return code, ((code + 761) << 20).to(tl.float32, bitcast=True)


@triton.jit
def key_codes(x, unit, scale):
    """Codes of keys ``[R, C]``, 1 to 15, given the numbers of channels ``[C]`` and tokens ``[R]``."""
    step = unit[None, :] * scale[:, None]
    ratio = tl.div_rn(x, tl.where(step > 0, step, 1.0))
    return round_half_even(tl.minimum(tl.maximum(ratio, -7.0), 7.0)).to(tl.int32) + 8


@triton.jit
def settle_keys(
    out, out_halves, codes, halves, end, block, head, heads, D: tl.constexpr, P: tl.constexpr, SLAB: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantise a wide slab of keys into the narrow one at ``out``."""
    width: tl.constexpr = D // 2
    cols = tl.arange(0, COLUMNS)
    for group in range(P // 16):
        offsets = group * 16 + tl.arange(0, 16)
        there = offsets >= 0
        low = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 0, 2, D, P, SLAB)
        high = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 1, 2, D, P, SLAB)
        fine = tl.minimum(is_finite(low), is_finite(high)) > 0
        low = tl.where(fine[:, None], low, 0.0)
        high = tl.where(fine[:, None], high, 0.0)
        low_largest = tl.max(tl.abs(low), 0)
        high_largest = tl.max(tl.abs(high), 0)
        overall = tl.maximum(tl.max(low_largest, 0), tl.max(high_largest, 0))
        low_byte, low_unit = channel_units(low_largest, overall)
        high_byte, high_unit = channel_units(high_largest, overall)
        most = tl.max(tl.div_rn(tl.abs(low), tl.zeros_like(low) + low_unit[None, :]), 1)
        most = tl.maximum(most, tl.max(tl.div_rn(tl.abs(high), tl.zeros_like(high) + high_unit[None, :]), 1))
        scale = to_bfloat16(tl.div_rn(most, 7.0), True)
        packed = key_codes(low, low_unit, scale) | (key_codes(high, high_unit, scale) << 4)
        inside = there[:, None] & (cols < width)[None, :]
        tl.store(out + (offsets * width)[:, None] + cols[None, :], packed.to(tl.uint8), mask=inside)
        channels = out + P * width + group * D + cols
        tl.store(channels, low_byte.to(tl.uint8), mask=cols < width)
        tl.store(channels + width, high_byte.to(tl.uint8), mask=cols < width)
        scale = tl.where(fine, scale, float("nan"))
        tl.store(out_halves + SLAB // 2 - P + offsets, scale.to(tl.bfloat16))


@triton.jit
def value_codes(x, relative):
    """Codes of values ``[R, C]`` that are parts of the row's largest, -2 to 1, for steps ``relative [R]``."""
    return tl.minimum(tl.maximum(tl.floor(tl.div_rn(x, tl.zeros_like(x) + relative[:, None])), -2.0), 1.0)


@triton.jit
def squared_error(x, relative):
    """Of each number of rows ``[R, C]`` that are quantised with steps ``relative [R]``."""
    error = x - (value_codes(x, relative) + 0.5) * relative[:, None]
    return error * error


@triton.jit
def settle_values(
    out, out_halves, codes, halves, end, block, head, heads, D: tl.constexpr, P: tl.constexpr, SLAB: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantise a wide slab of values into the narrow one at ``out``."""
    width: tl.constexpr = D // 4
    cols = tl.arange(0, COLUMNS)
    offsets = tl.arange(0, P)
    there = offsets >= 0
    inside = there[:, None] & (cols < width)[None, :]
    x0 = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 0, 4, D, P, SLAB)
    x1 = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 1, 4, D, P, SLAB)
    x2 = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 2, 4, D, P, SLAB)
    x3 = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 3, 4, D, P, SLAB)
    fine = tl.minimum(tl.minimum(is_finite(x0), is_finite(x1)), tl.minimum(is_finite(x2), is_finite(x3))) > 0
    largest = tl.maximum(tl.max(tl.abs(x0), 1), tl.max(tl.abs(x1), 1))
    largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(x2), 1), tl.max(tl.abs(x3), 1)))
    usable = fine & (largest > 0)
    divisor = tl.where(usable, largest, 1.0)
    x0 = tl.where(usable[:, None], tl.div_rn(x0, tl.zeros_like(x0) + divisor[:, None]), 0.0)
    x1 = tl.where(usable[:, None], tl.div_rn(x1, tl.zeros_like(x1) + divisor[:, None]), 0.0)
    x2 = tl.where(usable[:, None], tl.div_rn(x2, tl.zeros_like(x2) + divisor[:, None]), 0.0)
    x3 = tl.where(usable[:, None], tl.div_rn(x3, tl.zeros_like(x3) + divisor[:, None]), 0.0)
    least = tl.full((P,), float("inf"), tl.float32)
    scale = tl.zeros((P,), tl.float32)
    chosen = tl.full((P,), 1.0, tl.float32)
    for trial in range(9):
        step = to_bfloat16(divisor * ((8.0 + trial) * 0.03125), False)
        relative = tl.where(usable & (step > 0), tl.div_rn(step, divisor), 1.0)
        errors = squared_error(x0, relative) + squared_error(x1, relative)
        errors = tl.where(
            (cols < width)[None, :], errors + squared_error(x2, relative) + squared_error(x3, relative), 0.0
        )
        error = tl.sum(errors, 1)
        better = error < least
        least = tl.where(better, error, least)
        scale = tl.where(better, step, scale)
        chosen = tl.where(better, relative, chosen)
    packed = value_codes(x0, chosen) + 2.0 + (value_codes(x1, chosen) + 2.0) * 4.0
    packed += (value_codes(x2, chosen) + 2.0) * 16.0 + (value_codes(x3, chosen) + 2.0) * 64.0
    tl.store(out + (offsets * width)[:, None] + cols[None, :], packed.to(tl.int32).to(tl.uint8), mask=inside)
    scale = tl.where(fine, tl.where(usable, scale, 0.0), float("nan"))
    tl.store(out_halves + SLAB // 2 - P + offsets, scale.to(tl.bfloat16))


@triton.jit
def copy_halves(to, at, count, BLOCK: tl.constexpr):
    """Copy ``count`` numbers of 16 bits."""
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        tl.store(to + places, tl.load(at + places, mask=places < count), mask=places < count)


@triton.jit
def settle_kernel(
    between, between_halves, codes, halves, end, source, target, heads, D: tl.constexpr, P: tl.constexpr,
    SLAB: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What becomes of one slab of block ``source``, ``P * D`` halves apart in ``between``.

    ``codes`` is the cache in bytes and ``halves`` in bfloat16, ``end`` its length in those; so with ``between``.
    """
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    block = tl.load(source + pair).to(tl.int64)
    place = (pair * heads + head) * (P * D)
    out = between + 2 * place
    out_halves = between_halves + place
    if tl.load(target + pair) < 0:
        offsets = tl.arange(0, P)
        there = offsets >= 0
        cols = tl.arange(0, COLUMNS)
        scales = load_token_scales(halves, block, head, heads, offsets, there, P, SLAB)
        for part in tl.static_range(PARTS):
            x = load_part(codes, halves, end, block, head, heads, offsets, there, cols, part, PARTS, D, P, SLAB)
            places = (offsets * D + part * (D // PARTS))[:, None] + cols[None, :]
            tl.store(out_halves + places, (x * scales[:, None]).to(tl.bfloat16), mask=(cols < D // PARTS)[None, :])
    elif block >= 0:
        copy_halves(out_halves, halves + (block * heads + head) * (SLAB // 2), SLAB // 2, 1024)
    elif PARTS == 2:
        settle_keys(out, out_halves, codes, halves, end, block, head, heads, D, P, SLAB, COLUMNS)
    else:
        settle_values(out, out_halves, codes, halves, end, block, head, heads, D, P, SLAB, COLUMNS)


@triton.jit
def place_kernel(halves, end, between_halves, target, heads, D: tl.constexpr, P: tl.constexpr, SLAB: tl.constexpr):
    """One slab from between to block ``target``."""
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    block = tl.load(target + pair).to(tl.int64)
    at = between_halves + (pair * heads + head) * (P * D)
    if block < 0:
        copy_halves(halves + end + (block * heads + head) * (P * D), at, P * D, 1024)
    else:
        copy_halves(halves + (block * heads + head) * (SLAB // 2), at, SLAB // 2, 1024)
