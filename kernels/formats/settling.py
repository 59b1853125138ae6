"""Formats whose blocks settle: ``k4`` for keys and ``v2`` for values, together called k4v2.

A block is *wide* while tokens are written to it: rows of bfloat16. Once it is full, and no longer among the newest of
its sequence, it *settles*: it is quantised as a whole into a narrow block, with what all its tokens have in common. The
first block of a sequence, whose tokens everybody looks at, stays wide for ever. The shape of this is that of KIVI
(https://arxiv.org/abs/2402.02750) and KVQuant (https://arxiv.org/abs/2401.18079).

Numbers of blocks
    Both kinds lie in one tensor ``[B, Hkv, P, W]`` of bytes: narrow blocks from its beginning on, wide ones from its
    end. A narrow block has its place as number, 0 and up; a wide one is counted from the end and negative, -1 being the
    last. So slot ``block * P + offset`` of a wide block is negative too, and each kernel sees from the number what it
    reads. How many there are of each kind is the owner's business.

Narrow slabs
    ``k4``: P rows of nibbles ``code + 8``, split-half as in int4; then for each :data:`CHANNEL_GROUP` tokens a byte for
    each of D channels; then a bfloat16 for each token. A number is ``code * channel * scale``, code -7 to 7. The byte u
    of a channel stands for the float32 of the bits ``(u + 761) << 20``, at most 1: three bits of mantissa.
    ``v2``: P rows of D / 4 bytes, then a bfloat16 for each token. A number is ``(code - 1.5) * scale``, code 0 to 3;
    byte j holds dims j, j + D / 4, j + D / 2 and j + 3 D / 4, the first in its lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import CHANNEL_GROUP, FORMATS, SETTLED_SCALE_BYTES, CacheFormat
from kvpass.types import CacheSpec

CHANNEL_BIAS = 761  # of a channel's byte: 255 stands for 1
VALUE_STEPS = tuple(n / 32 for n in range(8, 17))  # scales that are tried, in units of the row's largest magnitude


def wide_view(cache: Tensor, form: CacheFormat) -> Tensor:
    """As many wide blocks as fit into a cache of a settling format: bfloat16 ``[n, Hkv, P, D]``, block -1 the last."""
    _, heads, size, stored = cache.shape
    flat, dim = cache.view(-1).view(torch.bfloat16), form.row_width(stored)
    count = flat.numel() // max(1, heads * size * dim)
    return flat[flat.numel() - count * heads * size * dim :].view(count, heads, size, dim)


def open_for_write(key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The wide blocks of a pair of caches as two bfloat16 caches, and the slots of their blocks, which must be wide."""
    keys, values = wide_view(key_cache, FORMATS["k4"]), wide_view(value_cache, FORMATS["v2"])
    count = min(len(keys), len(values))
    slots = slot_mapping + count * key_cache.shape[2]
    return keys[len(keys) - count :], values[len(values) - count :], slots


def quantise_keys(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of whole blocks.

    The channels' bytes are the largest magnitude of each channel in the group, relative to that of all, rounded up;
    a token's scale is the smallest with which no code leaves its range. So no number is off by more than half of
    ``scale * channel``, which is at most 1.14 / 7 of the largest magnitude of its channel in the group.

    Args:
        rows: float ``[..., P, D]``.

    Returns:
        codes uint8 ``[..., P, D / 2]``, channels uint8 ``[..., P / 16, D]``, scales bfloat16 ``[..., P]``: NaN for a
        row that is not finite, which then does not count for its channels.
    """
    groups = rows.float().unflatten(-2, (-1, CHANNEL_GROUP))
    finite = groups.isfinite().all(-1, keepdim=True)
    groups = groups.masked_fill(~finite, 0.0)
    largest = groups.abs().amax(-2, keepdim=True)
    relative = (largest / largest.amax(-1, keepdim=True)).nan_to_num(0.0)
    channels = ((relative.view(torch.int32) + 0xFFFFF) >> 20).sub_(CHANNEL_BIAS).clamp_(0, 255)
    units = _channel_units(channels)
    scales = _round_up((groups / units).abs().amax(-1, keepdim=True) / 7)
    codes = (groups / (units * scales.float())).nan_to_num(0.0).round_().clamp_(-7, 7)
    low, high = (codes + 8).to(torch.uint8).flatten(-3, -2).chunk(2, -1)
    scales = scales.masked_fill(~finite, torch.nan).squeeze(-1).flatten(-2)
    return low.bitwise_or(high << 4), channels.squeeze(-2).to(torch.uint8), scales


def quantise_values(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values of whole blocks, row by row.

    Of the scales :data:`VALUE_STEPS` times the row's largest magnitude, the one with the least square error: with the
    largest of them no number is off by more than a quarter of the row's largest, and the rest only lower the sum.

    Args:
        rows: float ``[..., P, D]``.

    Returns:
        codes uint8 ``[..., P, D / 4]``, scales bfloat16 ``[..., P]``: NaN for a row that is not finite.
    """
    rows = rows.float()
    absmax = rows.abs().amax(-1, keepdim=True)
    rows = (rows / absmax).nan_to_num(0.0)
    steps = (absmax * torch.tensor(VALUE_STEPS, device=rows.device)).to(torch.bfloat16).float()
    least = torch.full_like(absmax, torch.inf)
    best, scales = torch.zeros_like(rows), steps[..., -1:]
    for step in steps.split(1, -1):
        relative = step / absmax
        codes = (rows / relative).nan_to_num(0.0).floor_().clamp_(-2, 1)
        error = (rows - (codes + 0.5) * relative).square_().sum(-1, keepdim=True)
        better = error < least
        best, scales = torch.where(better, codes, best), torch.where(better, step, scales)
        least = torch.minimum(error, least)
    scales = scales.masked_fill(~absmax.isfinite(), torch.nan).squeeze(-1).to(torch.bfloat16)
    parts = best.add_(2).to(torch.uint8).chunk(4, -1)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6, scales


def settle_slabs(rows: Tensor, form: CacheFormat) -> Tensor:
    """Narrow slabs ``[..., P, W]`` of rows ``[..., P, D]``."""
    parts = quantise_keys(rows) if form.settles == "key" else quantise_values(rows)
    packed = torch.cat([part.contiguous().view(torch.uint8).flatten(len(rows.shape) - 2) for part in parts], -1)
    return packed.view(*rows.shape[:-1], form.stored_width(rows.shape[-1]))


def read_slabs(slabs: Tensor, form: CacheFormat) -> Tensor:
    """The numbers float32 ``[..., P, D]`` that narrow slabs ``[..., P, W]`` stand for; the inverse of the above."""
    size, dim = slabs.shape[-2], form.row_width(slabs.shape[-1])
    flat = slabs.flatten(-2)
    end = flat.shape[-1] - size * SETTLED_SCALE_BYTES
    codes = flat[..., : size * dim * form.bits // 8].unflatten(-1, (size, -1))
    scales = flat[..., end:].contiguous().view(torch.bfloat16).float().unsqueeze(-1)
    if form.settles == "value":
        parts: list[Tensor] = [(codes >> shift) & 3 for shift in (0, 2, 4, 6)]
        return torch.cat(parts, -1).float().sub_(1.5).mul_(scales)
    channels = flat[..., size * dim // 2 : end].unflatten(-1, (-1, dim))
    units = _channel_units(channels.int()).repeat_interleave(CHANNEL_GROUP, -2)
    return torch.cat((codes & 15, codes >> 4), -1).float().sub_(8).mul_(units * scales)


def read_blocks(cache: Tensor, form: CacheFormat, blocks: Tensor) -> Tensor:
    """The numbers of blocks of either kind: float32 ``[n, Hkv, P, D]`` for int64 ``blocks [n]``."""
    heads = torch.arange(cache.shape[1], device=cache.device)
    slabs = (blocks[:, None] * cache.shape[1] + heads).flatten()
    wide = wide_view(cache, form).flatten(0, 1)
    rows = gather_slabs(cache.flatten(0, 1), wide, form, slabs)
    return rows.view(-1, *cache.shape[1:3], rows.shape[-1])


def gather_slabs(narrow: Tensor, wide: Tensor, form: CacheFormat, slabs: Tensor) -> Tensor:
    """The numbers of slabs ``block * Hkv + head``, int64 ``[n]``: float32 ``[n, P, D]``.

    Args:
        narrow: all slabs, uint8 ``[B * Hkv, P, W]``.
        wide: all wide slabs, bfloat16 ``[n * Hkv, P, D]``.
        form: the settling format.
        slabs: negative where they are wide.
    """
    rows = read_slabs(narrow.index_select(0, slabs.clamp(min=0)), form)
    found = (slabs < 0).nonzero().flatten()
    if len(found):
        rows.index_copy_(0, found, wide.index_select(0, slabs[found] + len(wide)).float())
    return rows


def settle_cache(cache: Tensor, form: CacheFormat, source: Tensor, target: Tensor) -> None:
    """``kvpass::settle_blocks`` for one tensor of a settling format."""
    wide = wide_view(cache, form)
    settled, moved, widened = (source < 0) & (target >= 0), (source >= 0) & (target >= 0), target < 0
    slabs = settle_slabs(wide.index_select(0, source[settled] + len(wide)), form)
    blocks = cache.index_select(0, source[moved])
    rows = read_blocks(cache, form, source[widened]).to(wide.dtype)
    cache.index_copy_(0, target[settled], slabs)
    cache.index_copy_(0, target[moved], blocks)
    wide.index_copy_(0, target[widened] + len(wide), rows)


def _channel_units(channels: Tensor) -> Tensor:
    """What channels' bytes stand for: float32 of int32."""
    return ((channels + CHANNEL_BIAS) << 20).view(torch.float32)


def _round_up(numbers: Tensor) -> Tensor:
    """Positive float32 numbers in bfloat16, never smaller."""
    return (((numbers.view(torch.int32) + 0xFFFF) >> 16) << 16).view(torch.float32).to(torch.bfloat16)


class SettlingTables:
    """Block tables for caches of a plan that settles, where every block may be wide: the block and wide block alike.

    For those who drive a module by themselves, and for the verification; :class:`kvpass.Engine` has far fewer wide
    blocks than blocks. A block begins wide, and settles once another full block follows it; the first block of a
    sequence stays wide.
    """

    def __init__(
        self, specs: Sequence[CacheSpec], caches: Sequence[tuple[Tensor, Tensor]], num_blocks: int, block_size: int
    ) -> None:
        """Begin with wide blocks.

        Args:
            specs: all caches of the plan.
            caches: their tensors, allocated with ``num_blocks`` blocks and as many wide ones.
            num_blocks: B.
            block_size: P.
        """
        self._caches, self._formats = settling_caches(specs, caches)
        self._block_size = block_size
        self._wide = torch.ones(num_blocks, dtype=torch.bool)

    def settle(self, tables: Tensor, lengths: Tensor) -> None:
        """Settle what is due in sequences of which ``lengths [N]`` tokens are written; ``tables`` ``[G, N, W]``."""
        tables, lengths = tables.cpu(), lengths.cpu()
        index = torch.arange(tables.shape[2])
        due = (index > 0) & ((index + 2) * self._block_size <= lengths[:, None])
        blocks = tables[:, due].unique()
        blocks = blocks[self._wide[blocks]]
        if self._caches and len(blocks):
            target = blocks.to(self._caches[0].device)
            torch.ops.kvpass.settle_blocks(self._caches, self._formats, -1 - target, target)
            self._wide[blocks] = False

    def number(self, blocks: Tensor) -> Tensor:
        """The numbers of blocks as the caches have them."""
        return torch.where(self._wide.to(blocks.device)[blocks], -1 - blocks, blocks)

    def inputs(self, tables: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slots ``[G or 2 G, T]`` of tokens at ``positions [T]`` of sequences ``rows [T]``, and block tables.

        The second half of each is for the caches that settle, and left out where none does.
        """
        size = self._block_size
        all_tables = torch.cat((tables, self.number(tables))) if self._caches else tables
        return all_tables[:, rows, positions // size] * size + positions % size, all_tables


def settling_caches(
    specs: Sequence[CacheSpec], caches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[str]]:
    """The tensors that are in settling formats, and the names of these, each tensor once."""
    found: dict[int, tuple[Tensor, str]] = {}
    for spec, pair in zip(specs, caches, strict=True):
        for tensor, name in zip(pair, (spec.key_format, spec.value_format), strict=True):
            if FORMATS[name].settles is not None:
                found.setdefault(tensor.data_ptr(), (tensor, name))
    return [tensor for tensor, _ in found.values()], [name for _, name in found.values()]


def move_blocks(
    specs: Sequence[CacheSpec], caches: Sequence[tuple[Tensor, Tensor]], moves: Sequence[tuple[int | None, int]]
) -> None:
    """Copy blocks (source, target) at once in those of ``caches`` that settle; or, with sources of None, zero targets.

    Args:
        specs: all caches of the plan.
        caches: their tensors.
        moves: numbers of blocks in the caches, negative where they are wide. No target is a source, and a move that is
            made twice does no harm. Either all sources are None, of wide targets, or none is.
    """
    tensors, names = settling_caches(specs, caches)
    sources, targets = zip(*moves, strict=True)
    target = torch.tensor(targets, device=tensors[0].device)
    with torch.inference_mode():
        if None not in sources:
            torch.ops.kvpass.settle_blocks(tensors, names, torch.tensor(sources, device=target.device), target)
            return
        for tensor, name in zip(tensors, names, strict=True):
            wide_view(tensor, FORMATS[name])[target] = 0
