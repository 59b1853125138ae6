"""The launches of one attention call: schedule, attention, merge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.triton_kernels.device.attention import attention_kernel, merge_kernel
from kvpass.kernels.triton_kernels.device.mass import join_kernel, mass_kernel
from kvpass.kernels.triton_kernels.device.schedule import most_tiles, positions_kernel, schedule_kernel, schedule_size
from kvpass.kernels.triton_kernels.device.settled import settled_attention_kernel, settled_mass_kernel
from kvpass.kernels.triton_kernels.launch.launch import Launch, Target
from kvpass.kernels.triton_kernels.launch.stored import Stored, dot_dtype, dot_precision
from kvpass.kernels.triton_kernels.launch.tuning import Tile, choose_rows, choose_tile

LEAST_UNITS = 2  # units per program: shorter stretches cost more to merge than they gain
MERGED_ELEMENTS = 2048  # of the output, per program of the merge


@dataclass(frozen=True, eq=False)
class Features:
    """What changes scores beside queries and keys; see ``kvpass::paged_attention``."""

    softcap: float | None = None
    window: int | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    chunk: int | None = None
    tree_mask: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them."""
        bias = self.bias
        return {
            "softcap": self.softcap,
            "window": self.window,
            "chunk": self.chunk,
            "slopes": self.slopes,
            "bias": bias,
            "bias_rows": 0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            "bias_length": 0 if bias is None else bias.shape[-1],
            "tree_mask": None if self.tree_mask is None else self.tree_mask.view(torch.uint8),
            "tree_width": 0 if self.tree_mask is None else self.tree_mask.shape[1],
            "PAIRS": bias is not None and bias.dim() == 3,
        }


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention over paged caches, ready to be laid out.

    Attributes:
        query: ``[T, Hq, D]``, its last dim contiguous.
        keys: the key cache.
        values: the value cache; ``keys`` itself for latent attention.
        value_dim: Dv.
        block_tables: ``[N, W]``.
        seq_lens: ``[N]``.
        query_start: ``[N + 1]``.
        scale: factor of ``q.k``.
        features: the rest.
        shared: ``shared_start`` and ``shared_lens`` of a cascade.
        part: "whole"; or "prefix", the shared keys of a cascade; or "suffix", the others.
    """

    query: Tensor
    keys: Stored
    values: Stored
    value_dim: int
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float
    features: Features = field(default_factory=Features)
    shared: tuple[Tensor, Tensor] | None = None
    part: str = "whole"

    @property
    def heads(self) -> int:
        """Heads of the caches, Hkv."""
        return self.keys.tensor.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head, G."""
        return self.query.shape[1] // self.heads

    @property
    def block_size(self) -> int:
        """Tokens per block, P."""
        return self.keys.block_size

    def with_part(self, part: str) -> AttentionCall:
        """The same call for one part of a cascade; its sinks are added where the parts are merged."""
        return replace(self, part=part, features=replace(self.features, sinks=None))

    def choose_tile(self, target: Target) -> Tile:
        """The table's tile for this call."""
        tokens, sequences = self.query.shape[0], self.seq_lens.shape[0]
        if self.part == "prefix":
            assert self.shared is not None
            sequences = self.shared[1].shape[0]
        rows = choose_rows(tokens, sequences, self.group)
        bits = max(self.keys.form.bits, self.values.form.bits)
        compiled = replace(target, interpreted=False)
        if tl.float32 in (dot_dtype(self.query.dtype, form, compiled) for form in (self.keys.form, self.values.form)):
            bits = 32  # the dots take as much room as if that were stored
        extra = (self.features.softcap, self.features.slopes, self.features.bias, self.features.tree_mask)
        rich = any(feature is not None for feature in extra)
        tile = choose_tile(target, rows, max(self.keys.width, self.value_dim), bits, self.block_size, rich)
        if self.keys.form.settles is None:
            return tile
        if target.architecture == "sm_80" and self.block_size >= 64:  # with four warps it spills
            tile = tile._replace(warps=8, programs=1)
        # one kind of blocks in a tile
        return tile._replace(keys=min(tile.keys, 32 if rows == 16 else 16, self.block_size), stages=1)


def find_positions(call: AttentionCall) -> tuple[Tensor, Launch]:
    """Position of each token, int32 ``[T]``, and the launch that computes it."""
    tokens, tree = call.query.shape[0], call.features.tree_mask
    positions = call.query.new_empty(tokens, dtype=torch.int32)
    arguments = {
        "positions": positions,
        "query_start": call.query_start,
        "seq_lens": call.seq_lens,
        "tree_mask": None if tree is None else tree.view(torch.uint8),
        "tokens": tokens,
        "sequences": call.seq_lens.shape[0],
        "tree_width": 0 if tree is None else tree.shape[1],
        "BLOCK": 64,
        "WIDTH": 32,
    }
    return positions, Launch(positions_kernel, (triton.cdiv(tokens, 64),), arguments, stages=1)


def lay_out_attention(
    call: AttentionCall, out: Tensor, lse: Tensor | None, target: Target, positions: Tensor | None = None
) -> list[Launch]:
    """The launches that fill ``out [T, Hq, Dv]``, and ``lse`` float32 ``[T, Hq]`` if it is given.

    The grids depend on shapes alone. positions: from :func:`find_positions`, for trees and shared prefixes.
    """
    tile = call.choose_tile(target)
    tokens, sequences = call.query.shape[0], call.seq_lens.shape[0]
    shared_start, shared_lens = (None, None) if call.shared is None else call.shared
    groups = 0 if shared_lens is None else shared_lens.shape[0]
    entries = groups if call.part == "prefix" else sequences
    tiles = most_tiles(tokens, entries, call.group, tile.rows)
    programs = target.processors * tile.programs
    schedule = call.query.new_empty(schedule_size(tiles, entries), dtype=torch.int32)
    partial = call.query.new_empty(2 * programs * tile.rows, call.value_dim, dtype=torch.float32)
    partial_sums = call.query.new_empty(2 * programs * tile.rows, 2, dtype=torch.float32)
    features = call.features.arguments()
    common = {
        "query_start": call.query_start,
        "shared_start": shared_start,
        "schedule": schedule,
        "tiles": tiles,
        "heads": call.heads,
        "GROUP": call.group,
        "PART": call.part,
        "BLOCK_M": tile.rows,
    }
    sums = {
        "out": out,
        "lse": lse,
        "partial": partial,
        "partial_sums": partial_sums,
        "sinks": call.features.sinks,
        "DV": call.value_dim,
    }
    plan = {
        **common,
        "seq_lens": call.seq_lens,
        "shared_lens": shared_lens,
        "sequences": sequences,
        "groups": groups,
        "programs": programs,
        "window": call.features.window,
        "chunk": call.features.chunk,
        "BLOCK_N": tile.keys,
        "LEAST": LEAST_UNITS,
        "TREE": call.features.tree_mask is not None,
        "BLOCK": min(1024, max(32, triton.next_power_of_2(max(tiles, entries)))),
    }
    settled = call.keys.form.settles is not None
    attention = {
        **common,
        **sums,
        **features,
        **(describe_settled(call, target) if settled else describe_caches(call, target)),
        "query": call.query,
        "block_tables": call.block_tables,
        "seq_lens": call.seq_lens,
        "positions": positions,
        "scale": call.scale,
        "table_width": call.block_tables.shape[1],
        "stride_token": call.query.stride(0),
        "stride_head": call.query.stride(1),
        "BLOCK_N": tile.keys,
    }
    width = triton.next_power_of_2(call.value_dim)
    rows = max(1, min(tile.rows, MERGED_ELEMENTS // width))
    merge = {**common, **sums, "ROWS": rows, "WIDTH": width}
    return [
        Launch(schedule_kernel, (1,), plan, warps=2, stages=1),
        Launch(
            settled_attention_kernel if settled else attention_kernel, (programs,), attention, tile.warps, tile.stages
        ),
        Launch(merge_kernel, (tiles * call.heads, triton.cdiv(tile.rows, rows)), merge, stages=1),
    ]


def describe_caches(call: AttentionCall, target: Target) -> dict[str, Any]:
    """The caches, and the dots with them, as the attention kernels take them."""
    keys, values = call.keys, call.values
    latent = values is keys
    reached = values.piece_a * (4 if values.form.scaled else 1)  # dims that piece A covers
    value_b = 0 if latent and reached >= call.value_dim else values.piece_b
    dot = dot_dtype(call.query.dtype, keys.form, target)
    return {
        "key_cache": keys.tensor,
        "key_scales": keys.scales,
        "value_cache": values.tensor,
        "value_scales": values.scales,
        "P": call.block_size,
        "D": keys.width,
        "KEY_FORMAT": keys.spelling,
        "KEY_ROW": keys.row,
        "KEY_SLAB": keys.slab,
        "KEY_A": keys.piece_a,
        "KEY_B": keys.piece_b,
        "VALUE_FORMAT": values.spelling,
        "VALUE_ROW": values.row,
        "VALUE_SLAB": values.slab,
        "VALUE_A": values.piece_a,
        "VALUE_B": value_b,
        "LATENT": latent,
        "DOT": dot,
        "NORMED": call.query.dtype is torch.bfloat16 and dot is tl.float16,
        "VALUE_DOT": dot_dtype(call.query.dtype, values.form, target),
        "PRECISION": dot_precision(target),
    }


def describe_settled(call: AttentionCall, target: Target) -> dict[str, Any]:
    """The caches as the kernels of settling formats take them."""
    described = {"P": call.block_size, "D": call.keys.width, "PRECISION": dot_precision(target)}
    for part, stored in (("key", call.keys), ("value", call.values)):
        assert stored.scales is not None, "a settling format has scales"
        described |= {
            f"{part}_codes": stored.tensor,
            f"{part}_halves": stored.scales,
            f"{part}_end": stored.scales.numel(),
            f"{part.upper()}_SLAB": stored.slab,
            f"{part.upper()}_COLUMNS": stored.piece_a,
        }
    return described


def lay_out_mass(
    call: AttentionCall, lse: Tensor, mass: Tensor, target: Target, positions: Tensor | None = None
) -> Launch:
    """The launch that fills ``mass``, float32 ``[N, Hkv, W * P]``, from the call's log-sum-exp ``[T, Hq]``."""
    tile = call.choose_tile(target)
    taken: tuple[str, ...] = (
        "key_cache", "key_scales", "P", "D", "KEY_FORMAT", "KEY_ROW", "KEY_SLAB", "KEY_A", "KEY_B", "DOT", "NORMED",
        "PRECISION",
    )  # fmt: skip
    settled = call.keys.form.settles is not None
    if settled:
        taken = ("key_codes", "key_halves", "key_end", "P", "D", "KEY_SLAB", "KEY_COLUMNS", "PRECISION")
    caches = describe_settled(call, target) if settled else describe_caches(call, target)
    arguments = {
        **{name: caches[name] for name in taken},
        **call.features.arguments(),
        "mass": mass,
        "lse": lse,
        "query": call.query,
        "block_tables": call.block_tables,
        "seq_lens": call.seq_lens,
        "query_start": call.query_start,
        "positions": positions,
        "scale": call.scale,
        "table_width": call.block_tables.shape[1],
        "heads": call.heads,
        "stride_token": call.query.stride(0),
        "stride_head": call.query.stride(1),
        "GROUP": call.group,
        "BLOCK_M": 16,
        "BLOCK_N": tile.keys,
    }
    slots = call.block_tables.shape[1] * call.block_size
    grid = (call.seq_lens.shape[0], call.heads, triton.cdiv(slots, tile.keys))
    return Launch(settled_mass_kernel if settled else mass_kernel, grid, arguments, tile.warps, 1)


def lay_out_cascade(call: AttentionCall, out: Tensor, target: Target) -> list[Launch]:
    """The launches of a cascade: the shared keys once per group, the other keys once per sequence, and their sum.

    Without a window or chunk, within which the groups' rows would see different shared keys.
    """
    rows, width = out.shape[0] * out.shape[1], out.shape[2]
    positions, launch = find_positions(call)
    launches, parts = [launch], dict[str, Tensor]()
    for part in ("prefix", "suffix"):
        sums = torch.empty_like(out, dtype=torch.float32)
        lse = out.new_empty(out.shape[:2], dtype=torch.float32)
        if part == "prefix":  # rows of sequences that belong to no group are in no tile
            lse.fill_(-torch.inf)
            sums.zero_()
        parts |= {part: sums, f"{part}_lse": lse}
        launches += lay_out_attention(call.with_part(part), sums, lse, target, positions if part == "prefix" else None)
    columns = triton.next_power_of_2(width)
    per_program = max(1, MERGED_ELEMENTS // columns)
    arguments = {
        **parts,
        "out": out,
        "lse": None,
        "sinks": call.features.sinks,
        "rows": rows,
        "query_heads": out.shape[1],
        "WIDTH": width,
        "COLUMNS": columns,
        "ROWS": per_program,
    }
    return [*launches, Launch(join_kernel, (triton.cdiv(rows, per_program),), arguments, stages=1)]
