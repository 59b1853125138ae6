"""The dialects of ONNX in which each row of a batch owns its cache: ``onnx-static`` and ``onnx-growing``.

Static caches have a fixed number of places, and ``TensorScatter`` writes them; growing ones are the past with the new
tokens behind it, as generators of ONNX Runtime hand them on. Nothing is left to what a runtime makes of an attribute:
which keys are seen stands in an explicit mask, and where the standard has changed its mind about an order (softcap and
mask), or has no word (sinks), single ops are written out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvpass.exporters.dialects.coded_caches import INT8, coded, decode, encode, uncoded
from kvpass.exporters.dialects.lowerings import Call, Step, lowers
from kvpass.exporters.dialects.plain_ops import (
    Keys,
    attend,
    compute_dtype,
    no_trees,
    norm_rotary_write,
    position_bias,
    visible,
)

ONNX_STATIC, ONNX_GROWING = "onnx-static", "onnx-growing"
OPSET = 24  # of TensorScatter, and of the Attention that goes with it
PAST, KEYS = "past", "keys"  # what the contracts share: places in use by row, and where the keys are


def scattered(cache: Tensor, rows: Tensor, step: Step) -> Tensor:
    """A static cache ``[batch, H, context, D]`` with the new rows ``[batch, H, width, D]``."""
    inputs = [cache, rows, step.shared[PAST]]
    return torch.onnx.ops.symbolic(
        "TensorScatter", inputs, {"axis": 2, "mode": "linear"}, dtype=cache.dtype, shape=cache.shape
    )


def appended(cache: Tensor, rows: Tensor, step: Step) -> Tensor:
    """A growing cache ``[batch, H, past, D]`` with the new rows behind it."""
    return torch.cat((cache, rows), 2)


def _by_row(call: Call, tokens: Tensor) -> Tensor:
    """``[T, H, D]`` as ``[batch, H, width, D]``."""
    return tokens.reshape(-1, call.step.width, *tokens.shape[1:]).transpose(1, 2)


def _positions(call: Call) -> Tensor:
    return call.step.positions.reshape(-1, call.step.width)


def write_by(put: Callable[[Tensor, Tensor, Step], Tensor]) -> Callable[[Call], None]:
    """The lowering of a write, given how rows are put into a cache."""

    def write(call: Call) -> None:
        for part in ("key", "value"):
            name = f"{part}_cache"
            if call[name][0].shape[3]:  # else values are part of the keys
                new = encode(_by_row(call, call[part]), call[name], call.format_of(name))
                call.write(name, tuple(put(*pair, call.step) for pair in zip(call[name], new, strict=True)))

    return write


# Who hands growing caches on knows two tensors of a layer, and no scales.
for _dialect, _put, _cannot in ((ONNX_STATIC, scattered, uncoded), (ONNX_GROWING, appended, coded)):
    _write = write_by(_put)
    lowers("write_cache", _dialect, _cannot)(_write)
    lowers("norm_rotary_write", _dialect, _cannot)(
        lambda call, write=_write: norm_rotary_write(call, write)  # type: ignore[misc]
    )


@lowers("paged_attention", ONNX_STATIC, no_trees)
@lowers("paged_attention", ONNX_GROWING, no_trees)
def _paged(call: Call) -> Tensor:
    return _attend(call, _read(call, "key_cache"), _read(call, "value_cache"))


@lowers("latent_attention", ONNX_STATIC, uncoded)
@lowers("latent_attention", ONNX_GROWING, uncoded)
def _latent(call: Call) -> Tensor:
    rows = _read(call, "cache")
    return _attend(call, rows, rows[..., : call["value_dim"]])


def _read(call: Call, name: str) -> Tensor:
    """The numbers ``[batch, H, K, D]`` of a cache that is an argument."""
    held, form = call[name], call.format_of(name)
    if form != INT8:
        return decode(held, form, compute_dtype(call["query"]))
    # A row is a block that has one scale, which makes what the format means an op of the standard.
    facts = {"axis": 3, "block_size": held[0].shape[3]}
    return torch.onnx.ops.symbolic("DequantizeLinear", held, facts, dtype=torch.float32, shape=held[0].shape)


def has_no_node(call: Call) -> bool:
    """Whether the node ``Attention`` has no word, or no settled one, for an attention."""
    return call.given.get("softcap") is not None or call.given.get("sinks") is not None


def _attend(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    return (attend_by_ops if has_no_node(call) else attend_by_node)(call, keys, values)


def attend_by_ops(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """Attention ``[T, Hq, Dv]`` over caches ``[batch, H, K, D]`` in single ops."""
    query = call["query"]
    grid = _by_row(call, query).transpose(1, 2)
    out = attend(grid, keys, values, _positions(call), call.step.shared[KEYS], call.given)
    return out.reshape(-1, query.shape[1], values.shape[3]).to(query.dtype)


def attend_by_node(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """The same by a node ``Attention`` with its mask."""
    query, heads, width = call["query"], call["query"].shape[1], values.shape[3]
    rows = _by_row(call, query)
    inputs = [rows, keys.to(query.dtype), values.to(query.dtype), _mask(call, keys)]
    shape = [rows.shape[0], heads, call.step.width, width]
    out = torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": float(call["scale"]), "is_causal": 0}, dtype=query.dtype, shape=shape
    )
    return out.transpose(1, 2).reshape(-1, heads, width)


def _mask(call: Call, keys: Tensor) -> Tensor:
    """What is seen, bool ``[batch, 1, width, K]``; or what is added to the scores, where masks have numbers."""
    given, positions, where = call.given, _positions(call), call.step.shared[KEYS]
    assert isinstance(where, Keys)
    reach = f"mask of window {given.get('window')} and chunk {given.get('chunk')}"
    seen = call.step.once(reach, lambda: visible(positions, where, given)[:, None])
    assert isinstance(seen, Tensor)
    groups = (keys.shape[1], call["query"].shape[1] // keys.shape[1])
    bias = position_bias(positions, where, given, groups, torch.float32)
    if bias is None:
        return seen
    return bias.flatten(1, 2).masked_fill(~seen, -torch.inf).to(call["query"].dtype)
