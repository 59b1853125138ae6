"""The dialect ``onnx-tensorrt``: static caches in the part of ONNX that TensorRT for RTX takes whole.

Its parser leaves attributes and inputs of ``Attention`` that it does not know out without a word: windows
(``left_window_size`` of opset 25) and lengths (``nonpad_kv_seqlen`` of opset 24). So masks are spelt out, as bool
``[batch, 1, width, context]``. Its attention layer has kernels for half precision alone, for keys and values of one
width that is a multiple of 8 up to 256, and for a mask of bools; all other attention is written in single ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.exporters.dialects.coded_caches import coded
from kvpass.exporters.dialects.lowerings import Call, lowers
from kvpass.exporters.dialects.onnx_rows import attend_by_node, attend_by_ops, has_no_node, scattered, write_by
from kvpass.exporters.dialects.plain_ops import no_trees_or_codes, norm_rotary_write

ONNX_TENSORRT = "onnx-tensorrt"
HALVES = (torch.float16, torch.bfloat16)
WIDTHS = range(8, 257, 8)

_write = write_by(scattered)
lowers("write_cache", ONNX_TENSORRT, coded)(_write)
lowers("norm_rotary_write", ONNX_TENSORRT, coded)(lambda call: norm_rotary_write(call, _write))


@lowers("paged_attention", ONNX_TENSORRT, no_trees_or_codes)
def _paged(call: Call) -> Tensor:
    (keys,), (values,) = call["key_cache"], call["value_cache"]
    return _attend(call, keys, values)


@lowers("latent_attention", ONNX_TENSORRT, coded)
def _latent(call: Call) -> Tensor:
    (cache,) = call["cache"]
    if _has_kernel(call, cache):  # with values as wide as keys, of which what is no value is cut off
        return attend_by_node(call, cache, cache)[..., : call["value_dim"]]
    return attend_by_ops(call, cache, cache[..., : call["value_dim"]])


def _attend(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    by_node = _has_kernel(call, keys) and keys.shape[3] == values.shape[3]
    return (attend_by_node if by_node else attend_by_ops)(call, keys, values)


def _has_kernel(call: Call, keys: Tensor) -> bool:
    adds = call.given.get("slopes") is not None or call.given.get("bias") is not None
    return call["query"].dtype in HALVES and keys.shape[3] in WIDTHS and not adds and not has_no_node(call)
