"""The ops in plain torch: right everywhere, and quick enough to serve a processor.

Scores, softmax and the sum over values are computed in float32 (float64 for float64 queries) whatever the cache holds.
Keys and values are gathered a few mebibytes at a time and widened there, where it costs no memory traffic; a matrix
product of the G query heads that share a KV head then reads them once. See :mod:`kvpass.kernels.step_layout` for rows,
slabs and chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.step_layout import DecodeChunk, PrefillRun, Sight, StepLayout, Tiling, lay_out_step
from kvpass.kernels.step_memo import StepMemo

Args = ParamSpec("Args")
Result = TypeVar("Result")

GATHER_BYTES = {"cpu": 2 << 20}  # keys, and again values, held at once: they should stay in the processor's cache
SCORE_BYTES = {"cpu": 8 << 20}
DEVICE_BYTES = 64 << 20  # for both, on devices where a launch costs more than a miss

LAYOUTS: StepMemo[StepLayout] = StepMemo()
WRITTEN_ROWS: StepMemo[Tensor] = StepMemo()


def inference_only(op: Callable[Args, Result]) -> Callable[Args, Result]:
    """Run ``op`` without recording gradients, and in the dtypes it asks for even under autocast."""

    @functools.wraps(op)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        device = args[0].device.type if isinstance(args[0], Tensor) else "cpu"
        if torch.is_grad_enabled():
            with torch.no_grad():
                return run(*args, **kwargs)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(*args, **kwargs)
        return op(*args, **kwargs)

    return run


@inference_only
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over whole sequences; see ``kvpass::dense_attention`` in :mod:`kvpass.kernels.ops`."""
    batch, heads, rows, _ = query.shape
    groups = (key.shape[1], heads // key.shape[1])
    if key.shape[2] == 0:
        return query.new_zeros(batch, heads, rows, value.shape[3])
    compute = _compute_dtype(query)
    grouped = query.to(compute).mul(scale).unflatten(1, groups)
    out = query.new_empty(batch, *groups, rows, value.shape[3])
    if bias is not None:
        bias = bias.to(compute).expand(batch, heads, rows, key.shape[2]).unflatten(1, groups)
    if sinks is not None:
        sinks = sinks.to(compute).view(*groups, 1, 1)
    step = max(1, _budget(SCORE_BYTES, query) // (compute.itemsize * heads * key.shape[2]))
    for n in range(batch):
        keys, values = key[n].to(compute).transpose(1, 2), value[n].to(compute)
        for first in range(0, rows, step):
            piece = slice(first, first + step)
            scores = torch.bmm(grouped[n, :, :, piece].flatten(1, 2), keys).unflatten(1, (groups[1], -1))
            weights = _weigh(scores, softcap, None if bias is None else bias[n, :, :, piece], None, sinks)
            out[n, :, :, piece] = torch.bmm(weights.flatten(1, 2), values).unflatten(1, (groups[1], -1))
    return out.flatten(1, 2)


@inference_only
def write_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store new keys and values; see ``kvpass::write_cache`` in :mod:`kvpass.kernels.ops`."""
    _, heads, size, _ = key_cache.shape

    def find_rows() -> Tensor:
        block = slot_mapping.div(size, rounding_mode="floor")
        first = slot_mapping + block * ((heads - 1) * size)
        return (first[:, None] + torch.arange(heads, device=first.device) * size).flatten()

    rows = WRITTEN_ROWS.get((slot_mapping,), (heads, size), find_rows)
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, cache.shape[3]).index_copy_(0, rows, new.reshape(-1, new.shape[2]).to(cache.dtype))


@inference_only
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
) -> Tensor:
    """Attention of one step over the caches; see ``kvpass::paged_attention`` in :mod:`kvpass.kernels.ops`."""
    tokens, heads, width = query.shape
    _, kv_heads, size, value_width = value_cache.shape
    groups = (kv_heads, heads // kv_heads)
    if window is not None and window < 1:
        return query.new_zeros(tokens, heads, value_width)
    compute = _compute_dtype(query)
    tiling = Tiling(
        size,
        *groups,
        window,
        slabs=max(1, _budget(GATHER_BYTES, query) // (size * max(width, value_width) * compute.itemsize)),
        scores=_budget(SCORE_BYTES, query) // compute.itemsize,
    )
    step = (block_tables, seq_lens, query_start)
    layout = LAYOUTS.get(step, tiling, functools.partial(lay_out_step, *step, tiling))
    if layout.tokens != tokens:
        raise InputError(f"query has {tokens} rows, but query_start ends at {layout.tokens}")
    call = PagedCall(
        query=query.to(compute).mul(scale).view(tokens, *groups, width),
        keys=key_cache.view(-1, size * width),
        values=value_cache.view(-1, size * value_width),
        block_size=size,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(compute).view(*groups, 1, 1),
        bias=_prepare_bias(slopes, bias, groups, layout.longest, window, compute),
    )
    if len(layout.decode) == 1 and layout.decode[0].rows is None:
        return call.decode(layout.decode[0]).view(tokens, heads, value_width).to(query.dtype)
    out = query.new_empty(tokens, *groups, value_width)
    for run in layout.prefill:
        call.prefill(run, out)
    for chunk in layout.decode:
        assert chunk.rows is not None, "only a chunk that is the whole step has no rows"
        out.view(-1, groups[1], value_width).index_copy_(0, chunk.rows, call.decode(chunk).to(out.dtype))
    return out.view(tokens, heads, value_width)


@dataclass(frozen=True, eq=False)
class PagedCall:
    """The arguments of one paged attention, in the form that chunks and runs use.

    Attributes:
        query: scaled, in the compute dtype, ``[T, Hkv, G, D]``.
        keys: the cache as slabs, ``[B * Hkv, P * D]``.
        values: the same, ``[B * Hkv, P * Dv]``.
        block_size: P.
        softcap: as in the op.
        sinks: ``[Hkv, G, 1, 1]`` or None.
        bias: slopes and bias, or None.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    block_size: int
    softcap: float | None
    sinks: Tensor | None
    bias: PagedBias | None

    def decode(self, chunk: DecodeChunk) -> Tensor:
        """Outputs ``[R, G, Dv]`` of a chunk's rows."""
        rows, group_size = len(chunk.heads), self.query.shape[2]
        query = self.query.flatten(0, 1)
        if chunk.rows is not None:
            query = query.index_select(0, chunk.rows)
        found = [
            torch.bmm(query, self._gather(self.keys, part.slabs, rows)[:, : part.stop - part.start].transpose(1, 2))
            for part in chunk.parts
        ]
        scores = (found[0] if len(found) == 1 else torch.cat(found, 2)).view(rows, group_size, 1, -1)
        weights = self._weigh(scores, chunk.heads, chunk.sight).squeeze(2)
        sums = []
        for part in chunk.parts:
            values = self._gather(self.values, part.slabs, rows)
            if part.unseen is not None:
                values.view(-1, values.shape[2]).index_fill_(0, part.unseen, 0.0)
            sums.append(torch.bmm(weights[:, :, part.start : part.stop], values[:, : part.stop - part.start]))
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def prefill(self, run: PrefillRun, out: Tensor) -> None:
        """Write the outputs of a run's tokens and heads into ``out [T, Hkv, G, Dv]``."""
        heads, group_size = run.heads.stop - run.heads.start, self.query.shape[2]
        keys = self._gather(self.keys, run.slabs, heads)
        values = self._gather(self.values, run.slabs, heads)
        for piece in run.pieces:
            query = self.query[piece.tokens, run.heads].permute(1, 2, 0, 3).flatten(1, 2)
            scores = torch.bmm(query, keys[:, piece.keys].transpose(1, 2)).unflatten(1, (group_size, -1))
            weights = self._weigh(scores, run.heads, piece.sight).flatten(1, 2)
            sums = torch.bmm(weights, values[:, piece.keys]).unflatten(1, (group_size, -1))
            out[piece.tokens, run.heads] = sums.permute(2, 0, 1, 3).to(out.dtype)

    def _gather(self, cache: Tensor, slabs: Tensor, rows: int) -> Tensor:
        """A fresh tensor ``[rows, blocks * P, D]`` in the compute dtype."""
        return cache.index_select(0, slabs).to(self.query.dtype).view(rows, -1, cache.shape[1] // self.block_size)

    def _weigh(self, scores: Tensor, heads: Tensor | slice, sight: Sight) -> Tensor:
        bias = None if self.bias is None else self.bias.look_up(heads, sight)
        return _weigh(scores, self.softcap, bias, sight, None if self.sinks is None else self.sinks[heads])


@dataclass(frozen=True, eq=False)
class PagedBias:
    """What is added to the scores of a paged attention, by position.

    Attributes:
        slopes: ``[Hkv, G]`` or None.
        table: ``[Hkv | 1, G | 1, L]`` by distance or ``[Hkv | 1, G | 1, L * L]`` by (query, key), or None.
        length: L.
        by_pair: the table is indexed by (query, key).
    """

    slopes: Tensor | None
    table: Tensor | None
    length: int
    by_pair: bool

    def look_up(self, heads: Tensor | slice, sight: Sight) -> Tensor | None:
        """The bias of some KV heads, broadcastable to ``[R, G, m, K]``; None if there is none."""
        bias = None
        distance = sight.query - sight.key
        if self.slopes is not None:
            bias = self.slopes[heads][:, :, None, None] * -distance
        if self.table is not None:
            place = sight.query * self.length + sight.key if self.by_pair else distance
            table = self.table[heads] if len(self.table) > 1 else self.table
            shape = torch.broadcast_shapes(table.shape[:2], (len(place), 1))
            place = place.clamp(0, table.shape[2] - 1).expand(*shape, *place.shape[2:])
            found = table.expand(*shape, -1).gather(2, place.flatten(2)).view(place.shape)
            bias = found if bias is None else bias + found
        return bias


def _prepare_bias(
    slopes: Tensor | None,
    table: Tensor | None,
    groups: tuple[int, int],
    longest: int,
    window: int | None,
    dtype: torch.dtype,
) -> PagedBias | None:
    if slopes is None and table is None:
        return None
    if slopes is not None:
        slopes = slopes.to(dtype).view(groups)
    if table is None:
        return PagedBias(slopes, None, 0, False)
    length, by_pair = table.shape[-1], table.dim() == 3
    needed = longest if by_pair or window is None else min(longest, window)
    if needed > length:
        raise InputError(f"the bias covers {length} tokens, but the step needs {needed}: shorten the sequences")
    heads = (1, 1) if table.shape[0] == 1 else groups
    return PagedBias(slopes, table.to(dtype).reshape(*heads, -1), length, by_pair)


def _weigh(
    scores: Tensor, softcap: float | None, bias: Tensor | None, sight: Sight | None, sinks: Tensor | None
) -> Tensor:
    """Softmax of scores ``[R, G, m, K]``, overwriting them; a row that sees nothing weighs nothing."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.add_(bias)
    if sight is not None and sight.hidden is not None:
        scores[..., sight.hidden_from :].masked_fill_(sight.hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    if sinks is not None:
        # exp(s) / (exp(sink) + sum exp(s)) is softmax(s) * sigmoid(log sum exp(s) - sink)
        weights.mul_(torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - sinks))
    if bias is not None and weights[..., 0].isnan().any():
        weights.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return weights


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _budget(table: dict[str, int], tensor: Tensor) -> int:
    return table.get(tensor.device.type, DEVICE_BYTES)
