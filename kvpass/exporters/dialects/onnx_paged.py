"""The dialect ``onnx-paged``: nodes of the domain ``ai.kvpass``, each with a body of standard ops in the same file.

A runtime that knows nothing of kvpass runs the bodies; one that has kernels for block tables takes the nodes. A body is
what :mod:`~kvpass.exporters.dialects.plain_ops` computes, translated by itself, one for each signature that occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.exporters.dialects.coded_caches import CODINGS, decode, encode, row_width, suffixes, uncoded
from kvpass.exporters.dialects.lowerings import Call, lowers
from kvpass.exporters.dialects.plain_ops import (
    attend,
    compute_dtype,
    from_the_start,
    gather_rows,
    lay_out,
    no_trees,
    norm_rotary_write,
)

ONNX_PAGED = "onnx-paged"
DOMAIN = "ai.kvpass"
TABLES = ("slopes", "sinks", "bias")
NUMBERS = ("scale", "softcap", "window", "chunk", "value_dim")
FORMATS = ("key_format", "value_format", "format")


@dataclass(frozen=True)
class Signature:
    """What tells two nodes of one op apart, so that each has a body of its own.

    Attributes:
        op: the node's op.
        facts: its attributes.
        inputs: dtype and shape of each input, with names for the sizes that may change.
        names: of the inputs.
    """

    op: str
    facts: tuple[tuple[str, float | int | str], ...]
    inputs: tuple[tuple[torch.dtype, tuple[int | str, ...]], ...]
    names: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, float | int | str]:
        """The attributes by name."""
        return dict(self.facts)


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


Inputs = dict[str, tuple[Tensor, tuple[str, ...]]]  # tensors, with the names of their first dims, which may change


def node(
    call: Call, op: str, facts: Mapping[str, Any], inputs: Inputs, outputs: Sequence[tuple[torch.dtype, Any]]
) -> Sequence[Tensor]:
    """A node of ``ai.kvpass``, by its attributes, its inputs, and dtype and shape of each output."""
    described: list[tuple[torch.dtype, tuple[int | str, ...]]] = [
        (tensor.dtype, (*open_dims, *(int(size) for size in tensor.shape[len(open_dims) :])))
        for tensor, open_dims in inputs.values()
    ]
    signature = Signature(op, tuple(facts.items()), tuple(described), tuple(inputs))
    bodies = call.step.once("bodies", Bodies)
    tensors, (dtypes, shapes) = [tensor for tensor, _ in inputs.values()], zip(*outputs, strict=True)
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{bodies.name_of(signature)}", tensors, dict(facts), dtypes=dtypes, shapes=shapes, version=1
    )


def held_by(name: str, tensors: Sequence[Tensor], form: str | None) -> Inputs:
    """The tensors of a pool of blocks, as inputs of a node."""
    return {f"{name}{end}": (held, ("blocks",)) for end, held in zip(suffixes(form), tensors, strict=True)}


@lowers("write_cache", ONNX_PAGED, uncoded)
def _write(call: Call) -> None:
    for part in ("key", "value"):
        held, form = call[f"{part}_cache"], call.format_of(f"{part}_cache")
        if held[0].shape[3]:  # else values are part of the keys
            rows = call[part] if form in CODINGS else call[part].to(held[0].dtype)
            inputs: Inputs = held_by("cache", held, form)
            inputs |= {"rows": (rows, ("tokens",)), "slot_mapping": (call["slot_mapping"], ("tokens",))}
            facts = {} if form is None else {"format": form}
            outputs = [(tensor.dtype, tensor.shape) for tensor in held]
            call.write(f"{part}_cache", tuple(node(call, "WriteCache", facts, inputs, outputs)))


@lowers("norm_rotary_write", ONNX_PAGED, uncoded)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", ONNX_PAGED, no_trees)
def _paged(call: Call) -> Tensor:
    width = row_width(call["value_cache"], call.format_of("value_cache"))
    return _attention(call, ("key_cache", "value_cache"), width)


@lowers("latent_attention", ONNX_PAGED, uncoded)
def _latent(call: Call) -> Tensor:
    return _attention(call, ("cache",), call["value_dim"])


def _attention(call: Call, caches: Sequence[str], width: int) -> Tensor:
    query = call["query"]
    inputs: Inputs = {"query": (query, ("tokens",))}
    for name in caches:
        inputs |= held_by(name, call[name], call.format_of(name))
    inputs["block_tables"] = call["block_tables"], ("sequences", "columns")
    inputs["seq_lens"] = call["seq_lens"], ("sequences",)
    inputs["query_start"] = call["query_start"], ("starts",)
    inputs |= {name: (call[name], ()) for name in TABLES if call.given.get(name) is not None}
    facts = {name: call.given[name] for name in (*NUMBERS, *FORMATS) if call.given.get(name) is not None}
    op = "LatentAttention" if "cache" in caches else "PagedAttention"
    (found,) = node(call, op, facts, inputs, [(query.dtype, (*query.shape[:2], width))])
    return found


def written(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """As ``plain_ops.write_rows``, and not in place; by an op of the standard that runs for numbers of any dtype."""
    blocks, offsets, heads = slots // cache.shape[2], slots % cache.shape[2], torch.arange(cache.shape[1])
    index = torch.stack(torch.broadcast_tensors(blocks[:, None], heads[None], offsets[:, None]), -1)  # [T, H, 3]
    return torch.onnx.ops.symbolic("ScatterND", [cache, index, rows], dtype=cache.dtype, shape=cache.shape)


class Body(nn.Module):
    """What the nodes of a signature compute, of their inputs."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def forward(self, *inputs: Tensor) -> Any:
        """The node's output, or outputs."""
        given: dict[str, Any] = {**dict(zip(self.signature.names, inputs, strict=True)), **self.signature.attributes}
        if self.signature.op == "WriteCache":
            held, form = self._held(given, "cache", "format")
            new, slots = encode(given["rows"], held, form), given["slot_mapping"]
            return tuple(written(*pair, slots) for pair in zip(held, new, strict=True))
        query = given["query"]
        grid = lay_out(given["query_start"], given["seq_lens"], query.shape[0])
        if "cache" in given:
            keys = self._gathered(given, "cache", "format")
            values = keys[..., : given["value_dim"]]
        else:
            keys = self._gathered(given, "key_cache", "key_format")
            values = self._gathered(given, "value_cache", "value_format")
        where = from_the_start(keys.shape[2], given["seq_lens"])
        out = attend(query[grid.rows], keys, values, grid.positions, where, given)
        return out.flatten(0, 1)[grid.places].to(query.dtype)

    def _held(self, given: Mapping[str, Any], name: str, form: str) -> tuple[list[Tensor], str | None]:
        found = given.get(form)
        return [given[f"{name}{end}"] for end in suffixes(found)], found

    def _gathered(self, given: Mapping[str, Any], name: str, form: str) -> Tensor:
        held, found = self._held(given, name, form)
        rows = [gather_rows(tensor, given["block_tables"]) for tensor in held]
        return decode(rows, found, compute_dtype(given["query"]))

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
