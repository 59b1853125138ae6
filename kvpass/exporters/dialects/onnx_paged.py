"""The dialect ``onnx-paged``: nodes of the domain ``ai.kvpass``, each with a body of standard ops in the same file.

A runtime that knows nothing of kvpass runs the bodies; one that has kernels for block tables takes the nodes. A body is
what :mod:`~kvpass.exporters.dialects.plain_ops` computes, translated by itself, one for each signature that occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.exporters.dialects.lowerings import Call, lowers
from kvpass.exporters.dialects.plain_ops import (
    attend,
    float_formats_alone,
    from_the_start,
    gather_rows,
    lay_out,
    no_trees,
    norm_rotary_write,
)
from kvpass.exporters.dialects.plain_ops import write_rows as written

ONNX_PAGED = "onnx-paged"
DOMAIN = "ai.kvpass"
TABLES = ("slopes", "sinks", "bias")
NUMBERS = ("scale", "softcap", "window", "chunk", "value_dim")


@dataclass(frozen=True)
class Signature:
    """What tells two nodes of one op apart, so that each has a body of its own.

    Attributes:
        op: the node's op.
        numbers: its attributes.
        inputs: dtype and shape of each input, with names for the sizes that may change.
        names: of the inputs.
    """

    op: str
    numbers: tuple[tuple[str, float | int], ...]
    inputs: tuple[tuple[torch.dtype, tuple[int | str, ...]], ...]
    names: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, float | int]:
        """The attributes by name."""
        return dict(self.numbers)


class Bodies:
    """The signatures that occur in one program, each with the name of its function.

    Args:
        body: the module of a signature; None for :class:`Body`.
    """

    def __init__(self, body: Callable[[Signature], Body] | None = None) -> None:
        self.body: Callable[[Signature], Body] = Body if body is None else body
        self.names: dict[Signature, str] = {}

    def name_of(self, signature: Signature) -> str:
        """The op type of the nodes of a signature: the first of an op has its name, others a number behind it."""
        if signature not in self.names:
            count = sum(known.op == signature.op for known in self.names)
            self.names[signature] = f"{signature.op}_{count}" if count else signature.op
        return self.names[signature]


def node(call: Call, op: str, inputs: Mapping[str, tuple[Tensor, tuple[str, ...]]], shape: Any, like: Tensor) -> Tensor:
    """A node of ``ai.kvpass``; ``inputs`` are tensors with the names of their first dims, which may change."""
    numbers = {name: call.given[name] for name in NUMBERS if call.given.get(name) is not None}
    described: list[tuple[torch.dtype, tuple[int | str, ...]]] = [
        (tensor.dtype, (*open_dims, *(int(size) for size in tensor.shape[len(open_dims) :])))
        for tensor, open_dims in inputs.values()
    ]
    signature = Signature(op, tuple(numbers.items()) if op != "WriteCache" else (), tuple(described), tuple(inputs))
    bodies = call.step.once("bodies", Bodies)
    name = bodies.name_of(signature)
    tensors = [tensor for tensor, _ in inputs.values()]
    found = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", tensors, dict(signature.numbers), dtype=like.dtype, shape=shape, version=1
    )
    assert isinstance(found, Tensor)
    return found


@lowers("write_cache", ONNX_PAGED, float_formats_alone)
def _write(call: Call) -> None:
    for part in ("key", "value"):
        (cache,) = call[f"{part}_cache"]
        if cache.shape[3]:  # else values are part of the keys
            rows, slots = call[part].to(cache.dtype), call["slot_mapping"]
            inputs = {"cache": (cache, ("blocks",)), "rows": (rows, ("tokens",)), "slot_mapping": (slots, ("tokens",))}
            call.write(f"{part}_cache", (node(call, "WriteCache", inputs, cache.shape, cache),))


@lowers("norm_rotary_write", ONNX_PAGED, float_formats_alone)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", ONNX_PAGED, no_trees)
def _paged(call: Call) -> Tensor:
    (keys,), (values,) = call["key_cache"], call["value_cache"]
    return _attention(call, {"key_cache": keys, "value_cache": values}, values.shape[3])


@lowers("latent_attention", ONNX_PAGED, float_formats_alone)
def _latent(call: Call) -> Tensor:
    (cache,) = call["cache"]
    return _attention(call, {"cache": cache}, call["value_dim"])


def _attention(call: Call, caches: Mapping[str, Tensor], width: int) -> Tensor:
    query = call["query"]
    inputs: dict[str, tuple[Tensor, tuple[str, ...]]] = {"query": (query, ("tokens",))}
    inputs |= {name: (cache, ("blocks",)) for name, cache in caches.items()}
    inputs["block_tables"] = call["block_tables"], ("sequences", "columns")
    inputs["seq_lens"] = call["seq_lens"], ("sequences",)
    inputs["query_start"] = call["query_start"], ("starts",)
    inputs |= {name: (call[name], ()) for name in TABLES if call.given.get(name) is not None}
    op = "LatentAttention" if "cache" in caches else "PagedAttention"
    return node(call, op, inputs, (*query.shape[:2], width), query)


class Body(nn.Module):
    """What the nodes of a signature compute, of their inputs."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def forward(self, *inputs: Tensor) -> Any:
        """The node's output."""
        given: dict[str, Any] = {**dict(zip(self.signature.names, inputs, strict=True)), **self.signature.attributes}
        if self.signature.op == "WriteCache":
            return written(given["cache"], given["rows"], given["slot_mapping"], in_place=False)
        query, tables = given["query"], given["block_tables"]
        grid = lay_out(given["query_start"], given["seq_lens"], query.shape[0])
        keys = gather_rows(given["cache"] if "cache" in given else given["key_cache"], tables)
        values = keys[..., : given["value_dim"]] if "cache" in given else gather_rows(given["value_cache"], tables)
        where = from_the_start(keys.shape[2], given["seq_lens"])
        out = attend(query[grid.rows], keys, values, grid.positions, where, given)
        return out.flatten(0, 1)[grid.places].to(query.dtype)

    def examples(self) -> list[Tensor]:
        """Values of all inputs: three sequences of 4, 2 and 3 tokens."""
        sizes = {"tokens": 9, "sequences": 3, "starts": 4, "columns": 5, "blocks": 17}
        told = {
            "query_start": torch.tensor([0, 4, 6, 9]),
            "seq_lens": torch.tensor([4, 3, 3]),
            "slot_mapping": torch.arange(9),
            "block_tables": torch.arange(15).view(3, 5),
        }
        return [
            told[name]
            if name in told
            else torch.zeros([s if isinstance(s, int) else sizes[s] for s in shape], dtype=dtype)
            for name, (dtype, shape) in zip(self.signature.names, self.signature.inputs, strict=True)
        ]
