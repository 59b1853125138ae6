"""Attention of one step over paged caches, in plain torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import CacheFormat, format_of, read_tails, split_slabs, widen_codes
from kvpass.kernels.formats.settling import gather_slabs, wide_view
from kvpass.kernels.reference.scores import (
    GATHER_BYTES,
    SCORE_BYTES,
    PagedBias,
    budget,
    compute_dtype,
    prepare_bias,
    weigh,
)
from kvpass.kernels.step_layout import DecodeChunk, PrefillRun, Sight, StepLayout, Tiling, lay_out_step
from kvpass.kernels.step_memo import StepMemo
from kvpass.kernels.tree_layout import lay_out_tree

LAYOUTS: StepMemo[StepLayout] = StepMemo()


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::paged_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    keys, values = SlabReader.of(key_cache, key_format, query), SlabReader.of(value_cache, value_format, query)
    step = (block_tables, seq_lens, query_start)
    return attend(query, keys, values, step, scale, softcap, window, slopes, sinks, bias, chunk, tree_mask)


def paged_attention_stats(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kvpass::paged_attention_stats``; see :mod:`kvpass.kernels.attention_ops`."""
    keys, values = SlabReader.of(key_cache, key_format, query), SlabReader.of(value_cache, value_format, query)
    step = (block_tables, seq_lens, query_start)
    tokens, heads, _ = query.shape
    kv_heads, slots = key_cache.shape[1], block_tables.shape[1] * key_cache.shape[2]
    compute = compute_dtype(query)
    stats = Stats(
        torch.full((tokens, kv_heads, heads // kv_heads), -torch.inf, dtype=compute, device=query.device),
        query.new_zeros(len(block_tables), kv_heads, slots, dtype=compute) if mass else None,
    )
    out = attend(query, keys, values, step, scale, softcap, window, slopes, sinks, bias, chunk, tree_mask, stats)
    received = query.new_zeros(0, dtype=torch.float32) if stats.mass is None else stats.mass.float()
    return out, stats.log_sum.view(tokens, heads).float(), received


def latent_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    value_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    format: str | None = None,
) -> Tensor:
    """``kvpass::latent_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    keys, values = SlabReader.of(cache, format, query), SlabReader.of(cache, format, query, value_dim)
    step = (block_tables, seq_lens, query_start)
    return attend(query, keys, values, step, scale, softcap, window, slopes, sinks, bias, chunk, None)


def cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    shared_start: Tensor,
    shared_lens: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::cascade_attention``, each sequence by itself; see :mod:`kvpass.kernels.attention_ops`."""
    keys, values = SlabReader.of(key_cache, key_format, query), SlabReader.of(value_cache, value_format, query)
    step = (block_tables, seq_lens, query_start)
    return attend(query, keys, values, step, scale, softcap, window, slopes, sinks, bias, chunk, None)


def attend(
    query: Tensor,
    keys: SlabReader,
    values: SlabReader,
    step: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float | None,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    chunk: int | None,
    tree_mask: Tensor | None,
    stats: Stats | None = None,
) -> Tensor:
    """The attention of a step ``(block_tables, seq_lens, query_start)``: ``[T, Hq, Dv]``; fills ``stats``."""
    tokens, heads, width = query.shape
    groups = (keys.heads, heads // keys.heads)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk={chunk} must be at least 1")
    if window is not None and window < 1:
        return query.new_zeros(tokens, heads, values.width)
    compute = compute_dtype(query)
    tiling = Tiling(
        keys.block_size,
        *groups,
        window,
        slabs=max(1, budget(GATHER_BYTES, query) // (keys.block_size * max(width, values.width) * compute.itemsize)),
        scores=budget(SCORE_BYTES, query) // compute.itemsize,
        chunk=chunk,
    )
    if tree_mask is None:
        layout = LAYOUTS.get(step, tiling, functools.partial(lay_out_step, *step, tiling))
    else:
        layout = LAYOUTS.get((*step, tree_mask), tiling, functools.partial(lay_out_tree, *step, tree_mask, tiling))
    if layout.tokens != tokens:
        raise InputError(f"query has {tokens} rows, but query_start ends at {layout.tokens}")
    reach = min((limit for limit in (window, chunk) if limit is not None), default=None)
    call = PagedCall(
        query=query.to(compute).mul(scale).view(tokens, *groups, width),
        keys=keys,
        values=values,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(compute).view(*groups, 1, 1),
        bias=prepare_bias(slopes, bias, groups, layout.longest, reach, compute),
        stats=stats,
    )
    if len(layout.decode) == 1 and layout.decode[0].rows is None:
        return call.decode(layout.decode[0]).view(tokens, heads, values.width).to(query.dtype)
    out = query.new_empty(tokens, *groups, values.width)
    for run in layout.prefill:
        call.prefill(run, out)
    for part in layout.decode:
        assert part.rows is not None, "only a chunk that is the whole step has no rows"
        out.view(-1, groups[1], values.width).index_copy_(0, part.rows, call.decode(part).to(out.dtype))
    return out.view(tokens, heads, values.width)


@dataclass(frozen=True, eq=False)
class SlabReader:
    """A cache as a list of slabs.

    Attributes:
        slabs: ``[B * Hkv, P * W]``; bytes of the 8-bit formats, which not every device can index otherwise.
        form: format of the cache.
        heads: Hkv.
        block_size: P.
        row: numbers of a stored row.
        width: numbers of a row that are wanted, its first.
        dtype: into which elements are widened.
        wide: of a settling format the wide slabs, bfloat16 ``[n * Hkv, P, D]``.
    """

    slabs: Tensor
    form: CacheFormat
    heads: int
    block_size: int
    row: int
    width: int
    dtype: torch.dtype
    wide: Tensor | None = None

    @staticmethod
    def of(cache: Tensor, name: str | None, query: Tensor, width: int | None = None) -> SlabReader:
        """The reader of ``cache [B, Hkv, P, W]``, of format ``name``, for an attention of ``query``."""
        form = format_of(cache, name)
        _, heads, size, stored = cache.shape
        row = form.row_width(stored)
        flat = (cache.view(torch.uint8) if form.bits == 8 else cache).view(-1, size * stored)
        wide = None if form.settles is None else wide_view(cache, form).flatten(0, 1)
        return SlabReader(flat, form, heads, size, row, row if width is None else width, compute_dtype(query), wide)

    def gather(self, slabs: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """Elements ``[rows, K, D]``, a fresh tensor, and scales ``[rows, 1, K]`` where they are left to the caller."""
        if self.wide is not None:
            numbers = gather_slabs(self.slabs.unflatten(1, (self.block_size, -1)), self.wide, self.form, slabs)
            return numbers.to(self.dtype).view(rows, -1, self.row), None
        found = self.slabs.index_select(0, slabs)
        if not self.form.scaled:
            return found.view(self.form.dtype).to(self.dtype).view(rows, -1, self.row), None
        codes, tails = split_slabs(found.view(len(slabs), self.block_size, -1), self.form)
        elements = widen_codes(codes, self.form, self.dtype).view(rows, -1, self.row)
        scales, offsets = read_tails(tails, self.form)
        if offsets is None:
            return elements, scales.to(self.dtype).view(rows, 1, -1)
        scales, offsets = (part.to(self.dtype).view(rows, -1, 1) for part in (scales, offsets))
        return elements.mul_(scales).add_(offsets), None


@dataclass(frozen=True, eq=False)
class Stats:
    """What an attention is asked for besides its output.

    Attributes:
        log_sum: log-sum-exp of each row, ``[T, Hkv, G]``.
        mass: weights that each slot received, ``[N, Hkv, slots]``, or None.
    """

    log_sum: Tensor
    mass: Tensor | None

    def add_decode(self, chunk: DecodeChunk, log_sum: Tensor, weights: Tensor) -> None:
        """Of a decode chunk: ``log_sum [R, G, 1]`` and ``weights [R, G, 1, K]``."""
        flat = self.log_sum.view(-1, self.log_sum.shape[2])
        if chunk.rows is None:
            flat.copy_(log_sum.squeeze(2))
        else:
            flat.index_copy_(0, chunk.rows, log_sum.squeeze(2))
        if self.mass is not None:
            _, heads, slots = self.mass.shape
            received = weights.sum((1, 2))
            # A column past the last slot belongs to a longer row of the chunk; this one weighs nothing there.
            column = chunk.sight.key[:, 0, 0].clamp(max=slots - 1).expand_as(received)
            row = (chunk.sequences * heads + chunk.heads)[:, None].expand_as(received)
            self.mass.view(-1).index_add_(0, (row * slots + column).flatten(), received.flatten())

    def add_prefill(self, run: PrefillRun, tokens: slice, keys: slice, log_sum: Tensor, weights: Tensor) -> None:
        """Of a piece of a prefill run: ``log_sum [H, G, m]`` and ``weights [H, G, m, K]``."""
        self.log_sum[tokens, run.heads] = log_sum.permute(2, 0, 1)
        if self.mass is not None:
            slots = slice(run.origin + keys.start, run.origin + keys.stop)
            self.mass[run.sequence, run.heads, slots] += weights.sum((1, 2))


@dataclass(frozen=True, eq=False)
class PagedCall:
    """The arguments of one paged attention, in the form that chunks and runs use.

    Attributes:
        query: scaled, in the compute dtype, ``[T, Hkv, G, D]``.
        keys: the cache of the keys.
        values: the cache of the values.
        softcap: as in the op.
        sinks: ``[Hkv, G, 1, 1]`` or None.
        bias: slopes and bias, or None.
        stats: filled if given.
    """

    query: Tensor
    keys: SlabReader
    values: SlabReader
    softcap: float | None
    sinks: Tensor | None
    bias: PagedBias | None
    stats: Stats | None

    def decode(self, chunk: DecodeChunk) -> Tensor:
        """Outputs ``[R, G, Dv]`` of a chunk's rows."""
        rows, group_size = len(chunk.heads), self.query.shape[2]
        query = self.query.flatten(0, 1)
        if chunk.rows is not None:
            query = query.index_select(0, chunk.rows)
        found = []
        for part in chunk.parts:
            keys, scales = self.keys.gather(part.slabs, rows)
            scores = torch.bmm(query, keys[:, : part.stop - part.start].transpose(1, 2))
            found.append(scores if scales is None else scores.mul_(scales[:, :, : part.stop - part.start]))
        scores = (found[0] if len(found) == 1 else torch.cat(found, 2)).view(rows, group_size, 1, -1)
        log_sum: list[Tensor] | None = None if self.stats is None else []
        weights = self._weigh(scores, chunk.heads, chunk.sight, log_sum)
        if self.stats is not None and log_sum:
            self.stats.add_decode(chunk, log_sum[0], weights)
        weights = weights.squeeze(2)
        sums = []
        for part in chunk.parts:
            values, scales = self.values.gather(part.slabs, rows)
            of_part = weights[:, :, part.start : part.stop]
            if part.unseen is not None:
                # Codes are finite whatever the bytes are; of a scaled format only a scale can be NaN.
                held = values if scales is None else scales
                held.view(-1, values.shape[2] if scales is None else 1).index_fill_(0, part.unseen, 0.0)
            if scales is not None:
                of_part = of_part * scales[:, :, : part.stop - part.start]
            sums.append(torch.bmm(of_part, values[:, : part.stop - part.start, : self.values.width]))
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def prefill(self, run: PrefillRun, out: Tensor) -> None:
        """Write the outputs of a run's tokens and heads into ``out [T, Hkv, G, Dv]``."""
        heads, group_size = run.heads.stop - run.heads.start, self.query.shape[2]
        keys, key_scales = self.keys.gather(run.slabs, heads)
        values, value_scales = self.values.gather(run.slabs, heads)
        values = values[..., : self.values.width]
        for piece in run.pieces:
            query = self.query[piece.tokens, run.heads].permute(1, 2, 0, 3).flatten(1, 2)
            scores = torch.bmm(query, keys[:, piece.keys].transpose(1, 2))
            if key_scales is not None:
                scores.mul_(key_scales[:, :, piece.keys])
            log_sum: list[Tensor] | None = None if self.stats is None else []
            weights = self._weigh(scores.unflatten(1, (group_size, -1)), run.heads, piece.sight, log_sum)
            if self.stats is not None and log_sum:
                self.stats.add_prefill(run, piece.tokens, piece.keys, log_sum[0], weights)
            weights = weights.flatten(1, 2)
            if value_scales is not None:
                weights = weights * value_scales[:, :, piece.keys]
            sums = torch.bmm(weights, values[:, piece.keys]).unflatten(1, (group_size, -1))
            out[piece.tokens, run.heads] = sums.permute(2, 0, 1, 3).to(out.dtype)

    def _weigh(self, scores: Tensor, heads: Tensor | slice, sight: Sight, log_sum: list[Tensor] | None) -> Tensor:
        bias = None if self.bias is None else self.bias.look_up(heads, sight)
        return weigh(scores, self.softcap, bias, sight, None if self.sinks is None else self.sinks[heads], log_sum)
