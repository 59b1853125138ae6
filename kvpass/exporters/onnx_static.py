"""The dialect ``onnx-static``: ``TensorScatter`` and ``Attention`` over caches whose rows own their places.

Nothing is left to what a runtime makes of an attribute: which keys are seen stands in an explicit mask, and where the
standard has changed its mind about an order (softcap and mask), or has no word (sinks), single ops are written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.exporters.lowerings import Call, lowers
from kvpass.exporters.plain_ops import (
    attend,
    float_formats_alone,
    no_trees,
    norm_rotary_write,
    position_bias,
    visible,
)

ONNX_STATIC = "onnx-static"
OPSET = 24  # of TensorScatter, and of the Attention that goes with it


def _by_row(call: Call, tokens: Tensor) -> Tensor:
    """``[T, H, D]`` as ``[batch, H, width, D]``."""
    return tokens.reshape(-1, call.step.width, *tokens.shape[1:]).transpose(1, 2)


def _positions(call: Call) -> Tensor:
    return call.step.positions.reshape(-1, call.step.width)


@lowers("write_cache", ONNX_STATIC, float_formats_alone)
def _write(call: Call) -> None:
    past = call.step.once("past", lambda: _positions(call)[:, 0].contiguous())
    for part in ("key", "value"):
        (cache,) = call[f"{part}_cache"]
        if cache.shape[3]:  # else values are part of the keys
            rows = _by_row(call, call[part]).to(cache.dtype)
            scattered = torch.onnx.ops.symbolic(
                "TensorScatter", [cache, rows, past], {"axis": 2, "mode": "linear"},
                dtype=cache.dtype, shape=cache.shape,
            )  # fmt: skip
            call.write(f"{part}_cache", (scattered,))


@lowers("norm_rotary_write", ONNX_STATIC, float_formats_alone)
def _fused(call: Call) -> Tensor:
    return norm_rotary_write(call, _write)


@lowers("paged_attention", ONNX_STATIC, no_trees)
def _paged(call: Call) -> Tensor:
    (keys,), (values,) = call["key_cache"], call["value_cache"]
    return _attend(call, keys, values)


@lowers("latent_attention", ONNX_STATIC, float_formats_alone)
def _latent(call: Call) -> Tensor:
    (cache,) = call["cache"]
    return _attend(call, cache, cache[..., : call["value_dim"]])


def _attend(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    query, heads, width = call["query"], call["query"].shape[1], values.shape[3]
    if call.given.get("softcap") is not None or call.given.get("sinks") is not None:
        grid = _by_row(call, query).transpose(1, 2)
        out = attend(grid, keys, values, _positions(call), call["seq_lens"], call.given)
        return out.reshape(-1, heads, width).to(query.dtype)
    rows = _by_row(call, query)
    places = [rows.shape[0], heads, call.step.width, width]
    out = torch.onnx.ops.symbolic(
        "Attention", [rows, keys.to(query.dtype), values.to(query.dtype), _mask(call, keys)],
        {"scale": float(call["scale"]), "is_causal": 0}, dtype=query.dtype, shape=places,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(-1, heads, width)


def _mask(call: Call, keys: Tensor) -> Tensor:
    """What is seen, bool ``[batch, 1, width, context]``; or what is added to the scores, where masks have numbers."""
    given, positions = call.given, _positions(call)
    key = torch.arange(keys.shape[2], device=keys.device)
    reach = f"mask of window {given.get('window')} and chunk {given.get('chunk')}"
    seen = call.step.once(reach, lambda: visible(positions, key, given)[:, None])
    assert isinstance(seen, Tensor)
    groups = (keys.shape[1], call["query"].shape[1] // keys.shape[1])
    bias = position_bias(positions, key, given, groups, torch.float32)
    if bias is None:
        return seen
    return bias.flatten(1, 2).masked_fill(~seen, -torch.inf).to(call["query"].dtype)
