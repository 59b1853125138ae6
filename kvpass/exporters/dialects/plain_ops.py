"""The dialect ``plain``: a paged step in ATen alone, which any compiler of ATen takes.

It is the reference of the others: what a node of their own computes is defined by the functions of this file. New
tokens are laid out as ``[N, M]``, M being the most that a sequence has in the step, so that sequences do not see one
another's keys, and no score is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.exporters.dialects.coded_caches import coded, decode, encode, uncoded
from kvpass.exporters.dialects.lowerings import Call, Facts, Step, lowers
from kvpass.kernels.reference.cache import norm_rows, rotate_rows

PLAIN = "plain"


@dataclass(frozen=True)
class Keys:
    """Where gathered keys stand.

    Attributes:
        positions: int64 ``[K]``, or ``[N, K]`` where sequences differ.
        held: bool ``[N, K]``, which of them are keys of their sequence; None for all that a query may see.
    """

    positions: Tensor
    held: Tensor | None

    @property
    def by_query(self) -> Tensor:
        """The positions, broadcastable to ``[N, M, K]``."""
        return self.positions if self.positions.dim() == 1 else self.positions[:, None]


@dataclass(frozen=True)
class Grid:
    """The tokens of a step by sequence.

    Attributes:
        rows: int64 ``[N, M]``, the token in each place; places past a sequence's last token hold any token.
        positions: int64 ``[N, M]``.
        places: int64 ``[T]``, the place ``n * M + m`` of each token.
    """

    rows: Tensor
    positions: Tensor
    places: Tensor


def lay_out(query_start: Tensor, seq_lens: Tensor, tokens: Any, columns: Tensor | None = None) -> Grid:
    """The grid of a step of ``tokens`` tokens; ``columns [M]`` counts its columns, else their number is read."""
    counts = query_start[1:] - query_start[:-1]
    device = query_start.device
    if columns is None:
        found = counts.max().item()
        torch._check(found >= 1)
        torch._check(found <= tokens)
        columns = torch.arange(found, device=device)
    widest = columns.shape[0]
    rows = (query_start[:-1, None] + columns).clamp(max=tokens - 1)
    token = torch.arange(tokens, device=device)
    owner = sequence_of(query_start, token)
    places = owner * widest + token - query_start[owner]
    return Grid(rows, (seq_lens - counts)[:, None] + columns, places)


def sequence_of(query_start: Tensor, token: Tensor) -> Tensor:
    """The sequence ``[T]`` of each of the tokens."""
    return (token[:, None] >= query_start[None, 1:]).sum(-1)


def grid_of(step: Step) -> Grid:
    """The grid of the step, worked out once for all layers."""
    assert step.query_start is not None
    starts = step.query_start
    found = step.once("grid", lambda: lay_out(starts, step.seq_lens, step.token_ids.shape[0], step.columns))
    assert isinstance(found, Grid)
    return found


def write_rows(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """In place, the cache ``[B, H, P, W]`` with ``rows [T, H, W]`` at the slots ``[T]``, ``block * P + offset``."""
    size = cache.shape[2]
    heads = torch.arange(cache.shape[1], device=cache.device)
    index = ((slots // size)[:, None], heads[None, :], (slots % size)[:, None])
    rows = rows.to(cache.dtype)
    return cache.index_put_(index, rows)


def gather_rows(cache: Tensor, block_tables: Tensor) -> Tensor:
    """What the blocks of each sequence hold, ``[N, H, W * P, D]``; entries past its end may be anything."""
    held = cache[block_tables.clamp(0, cache.shape[0] - 1)]
    sequences, blocks, heads, size, dim = held.shape
    return held.permute(0, 2, 1, 3, 4).reshape(sequences, heads, blocks * size, dim)


def attend(query: Tensor, keys: Tensor, values: Tensor, query_positions: Tensor, where: Keys, given: Facts) -> Tensor:
    """Attention of a grid of queries over the keys of their sequences.

    Args:
        query: ``[N, M, Hq, D]``.
        keys: ``[N, H, K, D]``.
        values: ``[N, H, K, Dv]``.
        query_positions: int64 ``[N, M]``.
        where: positions of the keys; what is no key of its sequence is not looked at.
        given: scale and features of the op, as in :mod:`kvpass.kernels.attention_ops`.

    Returns:
        ``[N, M, Hq, Dv]`` in float32 (float64 of a float64 query).
    """
    compute = compute_dtype(query)
    sequences, width, query_heads, dim = query.shape
    heads, length = keys.shape[1], keys.shape[2]
    group = query_heads // heads
    q = query.to(compute).reshape(sequences, width, heads, group, dim).permute(0, 2, 3, 1, 4)
    seen = visible(query_positions, where, given)
    keys, values = keys.to(compute), values.to(compute)
    if where.held is not None:
        keys, values = (torch.where(where.held[:, None, :, None], part, 0.0) for part in (keys, values))
    scores = q.reshape(sequences, heads, group * width, dim) @ keys.transpose(2, 3) * given["scale"]
    scores = scores.reshape(sequences, heads, group, width, length)
    if given.get("softcap") is not None:
        scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
    bias = position_bias(query_positions, where, given, (heads, group), compute)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    sinks = given.get("sinks")
    if sinks is not None:
        more = sinks.to(compute).reshape(1, heads, group, 1, 1).expand(sequences, heads, group, width, 1)
        weights = torch.softmax(torch.cat((scores, more), -1), -1)[..., :length]
    else:
        weights = torch.softmax(scores, -1)
    weights = torch.where(scores.amax(-1, keepdim=True) == -torch.inf, 0.0, weights)
    out = weights.reshape(sequences, heads, group * width, length) @ values
    out = out.reshape(sequences, heads, group, width, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(sequences, width, query_heads, -1)


def compute_dtype(query: Tensor) -> torch.dtype:
    """In what an attention is computed: at least float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def visible(query: Tensor, where: Keys, given: Facts) -> Tensor:
    """Which keys the queries at positions ``[N, M]`` see, bool ``[N, M, K]``; before any bias."""
    query, key = query[:, :, None], where.by_query
    seen = key <= query if where.held is None else (key <= query) & where.held[:, None]
    if given.get("window") is not None:
        seen = seen & (query - key < given["window"])
    if given.get("chunk") is not None:
        seen = seen & (query // given["chunk"] == key // given["chunk"])
    return seen


def position_bias(
    query: Tensor, where: Keys, given: Facts, groups: tuple[int, int], compute: torch.dtype
) -> Tensor | None:
    """What is added to the scores by position, broadcastable to ``[N, H, G, M, K]``; None for nothing."""
    bias, key = None, where.by_query
    if given.get("slopes") is not None:
        distance = (query[:, :, None] - key).to(compute)[:, None, None]
        bias = -given["slopes"].to(compute).reshape(1, *groups, 1, 1) * distance
    table = given.get("bias")
    if table is not None:
        length = table.shape[-1]
        place = query[:, :, None] - key
        if table.dim() == 3:
            place = query[:, :, None].clamp(max=length - 1) * length + key.clamp(max=length - 1)
        flat = table.to(compute).reshape(table.shape[0], -1)
        found = flat[:, place.clamp(0, flat.shape[1] - 1)].transpose(0, 1)  # [N, 1 | Hq, M, K]
        found = found.unsqueeze(1) if table.shape[0] == 1 else found.unflatten(1, groups)
        bias = found if bias is None else bias + found
    return bias


def from_the_start(length: Any, seq_lens: Tensor) -> Keys:
    """Keys that stand in order, as many as each sequence is long."""
    positions = torch.arange(length, device=seq_lens.device)
    return Keys(positions, positions < seq_lens[:, None])


def paged(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """The attention of a step over gathered keys and values, ``[T, Hq, Dv]``."""
    grid = grid_of(call.step)
    where = call.step.once("keys", lambda: from_the_start(keys.shape[2], call["seq_lens"]))
    out = attend(call["query"][grid.rows], keys, values, grid.positions, where, call.given)
    return out.flatten(0, 1)[grid.places].to(call["query"].dtype)


def no_trees(facts: Facts) -> str | None:
    """A mask of a tree of drafts, or formats that have no tensors of their own."""
    return "a tree mask" if facts.get("tree_mask") is not None else uncoded(facts)


def no_trees_or_codes(facts: Facts) -> str | None:
    """A mask of a tree of drafts, or caches that are no plain numbers."""
    return "a tree mask" if facts.get("tree_mask") is not None else coded(facts)


def norm_rotary_write(call: Call, write: Any) -> Tensor:
    """Norms, rotation and write as single ops, ``write`` being the dialect's own."""
    query, key = call["query"], call["key"]
    rows = [norm_rows(query.float(), call["query_weight"], call["eps"])]
    rows.append(norm_rows(key.float(), call["key_weight"], call["eps"]))
    if call["cos"] is not None:
        rows = [rotate_rows(row, call["cos"], call["sin"], call["interleaved"]) for row in rows]
    write(Call("write_cache", call.target, {**call.given, "key": rows[1]}, call.caches, call.step))
    return rows[0].to(query.dtype)


@lowers("write_cache", PLAIN, uncoded)
def _write(call: Call) -> None:
    for part in ("key", "value"):
        name = f"{part}_cache"
        if call[name][0].shape[3]:  # else values are part of the keys
            new = encode(call[part], call[name], call.format_of(name))
            slots = call["slot_mapping"]
            written = (write_rows(cache, rows, slots) for cache, rows in zip(call[name], new, strict=True))
            call.write(name, tuple(written))


@lowers("norm_rotary_write", PLAIN, uncoded)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", PLAIN, no_trees)
def _paged(call: Call) -> Tensor:
    return paged(call, _gather(call, "key_cache"), _gather(call, "value_cache"))


@lowers("latent_attention", PLAIN, uncoded)
def _latent(call: Call) -> Tensor:
    rows = _gather(call, "cache")
    return paged(call, rows, rows[..., : call["value_dim"]])


def _gather(call: Call, name: str) -> Tensor:
    """The numbers ``[N, H, W * P, D]`` of a cache that is an argument."""
    held = [gather_rows(tensor, call["block_tables"]) for tensor in call[name]]
    return decode(held, call.format_of(name), compute_dtype(call["query"]))
