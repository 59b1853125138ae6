"""The dialect ``onnx-contrib-paged``: ``com.microsoft::PagedAttention`` of ONNX Runtime's CUDA provider, and its twin.

The node has no kernel on a CPU. So a step is traced as its *twin*, whose nodes are of ``ai.kvpass`` with bodies of
standard ops: what the schema of the op says of its inputs and attributes, by the functions of ``plain_ops``. The twin
is what an audit runs on a CPU; the file for the CUDA provider is the twin with other names on its nodes, see
:mod:`kvpass.exporters.writers.contrib_files`. Blocks are ``[blocks, block size, heads, width]``, and a node writes the
new rows before it attends, as in :mod:`~kvpass.exporters.dialects.contrib_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpass.exporters.dialects.contracts import Paged, Port
from kvpass.exporters.dialects.contrib_rows import (
    WAITING,
    cannot_attend,
    even,
    waiting_rows,
    wide,
    widest_row,
)
from kvpass.exporters.dialects.lowerings import Call, Facts, Step, lowers
from kvpass.exporters.dialects.onnx_paged import DOMAIN, Bodies, Body, Signature
from kvpass.exporters.dialects.plain_ops import attend, from_the_start, lay_out, no_trees_or_codes, norm_rotary_write
from kvpass.types import CachePlan

ONNX_CONTRIB_PAGED = "onnx-contrib-paged"
TWIN_OP = "PagedAttentionTwin"  # in the domain of the twin
LEAST_BLOCK = 16  # tokens of a block, of which the op asks a power of two from here on


@dataclass(frozen=True)
class PagedRows(Paged):
    """All new tokens in one row, block tables and pools of blocks, in which a token's heads lie together.

    Heads have a width that is a multiple of 8, the same for keys and values; what is narrower has zeros behind it.
    """

    def inputs(self, plan: CachePlan) -> list[Port]:
        """All inputs in order, the caches last."""
        return [self._laid_out(port, plan) for port in super().inputs(plan)]

    def _laid_out(self, port: Port, plan: CachePlan) -> Port:
        if port.cache is None:
            return port
        blocks, heads, size, _ = port.shape
        return replace(port, shape=(blocks, size, heads, even(widest_row(plan, port.cache))))


def no_paged_caches(plan: CachePlan) -> str | None:
    """Caches that PagedAttention does not hold, or that the twin cannot be run with."""
    for spec in plan.caches:
        for form in (spec.key_format, spec.value_format):
            if form != "float16":
                return f"a cache in {form}"
    if plan.block_size < LEAST_BLOCK:
        return f"blocks of {plan.block_size} tokens, which have to be {LEAST_BLOCK} at least"
    return None


def cannot_page(facts: Facts) -> str | None:
    """What of an attention PagedAttention does not say."""
    for name, said in (("slopes", "slopes"), ("bias", "a bias"), ("chunk", "chunks")):
        if facts.get(name) is not None:
            return said
    return cannot_attend(facts)


def cannot_page_latents(facts: Facts) -> str | None:
    """Likewise, of an attention whose values are a part of the keys."""
    return "sinks of a latent attention" if facts.get("sinks") is not None else cannot_page(facts)


@lowers("write_cache", ONNX_CONTRIB_PAGED, no_trees_or_codes)
def _write(call: Call) -> None:
    waiting = call.step.once(WAITING, dict)
    for part in ("key", "value"):
        (cache,), rows = call[f"{part}_cache"], call[part]
        if cache.shape[3]:  # else values are part of the keys
            given = wide(rows.to(cache.dtype), cache.shape[3]).flatten(1)
            waiting[call.caches[f"{part}_cache"]] = rows.shape[2], given, call["slot_mapping"]


@lowers("norm_rotary_write", ONNX_CONTRIB_PAGED, no_trees_or_codes)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", ONNX_CONTRIB_PAGED, cannot_page)
def _paged(call: Call) -> Tensor:
    dim, _, _ = waiting_rows(call, "value_cache")
    out = _node(call, {"key": "key_cache", "value": "value_cache"}, {})
    return out[..., :dim]


@lowers("latent_attention", ONNX_CONTRIB_PAGED, cannot_page_latents)
def _latent(call: Call) -> Tensor:
    return _node(call, {"key": "cache"}, {"v_head_size": int(call["value_dim"])})


def _node(call: Call, parts: Mapping[str, str], more: Mapping[str, int]) -> Tensor:
    """A node of the twin, ``[T, Hq, Dv]``; ``parts`` are the arguments of the caches that it writes and reads."""
    step, query = call.step, call["query"]
    held = {part: call[name][0] for part, name in parts.items()}
    width, heads = held["key"].shape[3], query.shape[1]
    new = {part: waiting_rows(call, name) for part, name in parts.items()}
    slots = new["key"][2]
    starts, past = step.once("lengths of the node", lambda: _lengths(step))
    given: dict[str, tuple[Tensor, tuple[str, ...]]] = {"query": (wide(query, width).flatten(1), ("tokens",))}
    given |= {part: (rows, ("tokens",)) for part, (_, rows, _) in new.items()}
    given |= {f"{part}_cache": (cache, ("blocks",)) for part, cache in held.items()}
    given["cumulative_sequence_length"] = starts, ("starts",)
    given["past_seqlens"] = past, ("sequences",)
    given["block_table"] = call["block_tables"].to(torch.int32), ("sequences", "columns")
    given["slot_mapping"] = slots.to(torch.int32), ("tokens",)
    if call.given.get("sinks") is not None:
        given["head_sink"] = call["sinks"].to(query.dtype), ()
    numbers: dict[str, Any] = {"num_heads": heads, "kv_num_heads": held["key"].shape[2]}
    numbers |= {"scale": float(call["scale"]), **more}
    if call.given.get("softcap") is not None:
        numbers["softcap"] = float(call["softcap"])
    if call.given.get("window") is not None:
        numbers["local_window_size"] = int(call["window"])
    signature = Signature(TWIN_OP, tuple(numbers.items()), tuple(map(_described, given.values())), tuple(given))
    name = step.once("bodies", lambda: Bodies(TwinBody)).name_of(signature)
    tensors, dim = [tensor for tensor, _ in given.values()], more.get("v_head_size", width)
    out, *after = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", tensors, numbers, version=1,
        dtypes=[query.dtype, *(cache.dtype for cache in held.values())],
        shapes=[[query.shape[0], heads * dim], *(cache.shape for cache in held.values())],
    )  # fmt: skip
    for part, cache in zip(parts.values(), after, strict=True):
        call.write(part, (cache,))
    return out.reshape(-1, heads, dim)


def _described(given: tuple[Tensor, tuple[str, ...]]) -> tuple[torch.dtype, tuple[int | str, ...]]:
    tensor, open_dims = given
    return tensor.dtype, (*open_dims, *(int(size) for size in tensor.shape[len(open_dims) :]))


def _lengths(step: Step) -> tuple[Tensor, Tensor]:
    """``cumulative_sequence_length [N + 1]`` and ``past_seqlens [N]``, int32."""
    starts = step.query_start
    assert starts is not None
    return starts.to(torch.int32), (step.seq_lens - (starts[1:] - starts[:-1])).to(torch.int32)


class TwinBody(Body):
    """What the schema says that a node computes, of the inputs and attributes that it has."""

    def forward(self, *inputs: Tensor) -> Any:
        """The node's outputs: attention ``[T, Hq * Dv]``, and the caches after it."""
        given: dict[str, Any] = {**dict(zip(self.signature.names, inputs, strict=True)), **self.signature.attributes}
        starts, past = given["cumulative_sequence_length"].long(), given["past_seqlens"].long()
        held = {part: self._written(given, part) for part in ("key", "value") if f"{part}_cache" in given}
        tables = given["block_table"].long()
        query = given["query"].unflatten(1, (given["num_heads"], -1))
        lens = past + starts[1:] - starts[:-1]
        grid = lay_out(starts, lens, query.shape[0])
        keys = _gathered(held["key"], tables)
        values = _gathered(held["value"], tables) if "value" in held else keys[..., : given["v_head_size"]]
        facts = {"scale": given["scale"], "softcap": given.get("softcap"), "window": given.get("local_window_size")}
        facts["sinks"] = given.get("head_sink")
        where = from_the_start(keys.shape[2], lens)
        out = attend(query[grid.rows], keys, values, grid.positions, where, facts)
        return out.flatten(0, 1)[grid.places].flatten(1).to(query.dtype), *held.values()

    def _written(self, given: Mapping[str, Any], part: str) -> Tensor:
        cache, slots = given[f"{part}_cache"], given["slot_mapping"].long()
        rows = given[part].unflatten(1, (given["kv_num_heads"], -1))
        found: Tensor = cache.index_put((slots // cache.shape[1], slots % cache.shape[1]), rows)
        return found

    def examples(self) -> list[Tensor]:
        """Values of all inputs: three sequences of 4, 2 and 3 tokens."""
        sizes = {"tokens": 9, "sequences": 3, "starts": 4, "columns": 5, "blocks": 17}
        told = {
            "cumulative_sequence_length": torch.tensor([0, 4, 6, 9], dtype=torch.int32),
            "past_seqlens": torch.tensor([0, 1, 0], dtype=torch.int32),
            "slot_mapping": torch.arange(9, dtype=torch.int32),
            "block_table": torch.arange(15, dtype=torch.int32).view(3, 5),
        }
        return [
            told[name]
            if name in told
            else torch.zeros([s if isinstance(s, int) else sizes[s] for s in shape], dtype=dtype)
            for name, (dtype, shape) in zip(self.signature.names, self.signature.inputs, strict=True)
        ]


def _gathered(cache: Tensor, tables: Tensor) -> Tensor:
    """What the blocks of each sequence hold, ``[N, H, W * P, D]``; entries past its end may be anything."""
    held = cache[tables.clamp(0, cache.shape[0] - 1)]
    sequences, blocks, size, heads, dim = held.shape
    return held.permute(0, 3, 1, 2, 4).reshape(sequences, heads, blocks * size, dim)
