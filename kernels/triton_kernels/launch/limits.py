"""What the Triton kernels serve, and what makes a call wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import FORMATS, format_of
from kvpass.kernels.triton_kernels.launch.stored import FLOATS
from kvpass.types import dtype_name

WIDEST = 576
WIDEST_FLOAT32 = 128  # where dots are float32
CACHES = ("key_cache", "value_cache", "cache")
INDICES = ("block_tables", "seq_lens", "query_start", "slot_mapping", "shared_start", "shared_lens", "source", "target")
FLOAT_ARGUMENTS = ("query", "key", "value", "slopes", "sinks", "bias", "query_weight", "key_weight")
FORMAT_OF = {"key_cache": "key_format", "value_cache": "value_format", "cache": "format"}


def explain_refusal(op: str, arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot serve a call that may be right in itself, or None."""
    for name in FLOAT_ARGUMENTS:
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {dtype_name(tensor.dtype)}: the kernels take float32, float16 and bfloat16"
    for name in CACHES:
        cache = arguments.get(name)
        if cache is None:
            continue
        size = cache.shape[2]
        if size < 4 or size & (size - 1):
            return "the block size is no power of two from 4 on"
        form = format_of(cache, arguments.get(FORMAT_OF[name]))
        if form.dtype is torch.float64:
            return f"{name} is float64: the kernels take {', '.join(FORMATS)}"
        if form.scaled and form.row_width(cache.shape[3]) * form.bits % 32:
            return f"the head dim of {name} is no multiple of {32 // form.bits}, as {form.name} needs"
        if form.row_width(cache.shape[3]) > WIDEST:
            return f"a head of {name} is wider than {WIDEST}"
    for cache in arguments.get("caches", ()) if op == "settle_blocks" else ():
        if cache.shape[2] & (cache.shape[2] - 1):
            return "the block size is no power of two"
    if op.endswith("attention") or op == "paged_attention_stats":
        return _explain_width(arguments)
    return None


def _explain_width(arguments: Mapping[str, Any]) -> str | None:
    query, widest, plain = arguments["query"], arguments["query"].shape[2], arguments["query"].dtype is torch.float32
    for name in CACHES:
        if name in arguments:
            form = format_of(arguments[name], arguments.get(FORMAT_OF[name]))
            widest = max(widest, form.row_width(arguments[name].shape[3]))
            plain |= form.settles is not None or (form.bits > 8 and form.dtype is not query.dtype)
    if plain and widest > WIDEST_FLOAT32:
        return f"heads are wider than {WIDEST_FLOAT32} in float32, or in two float dtypes at once"
    return None


def check_arguments(op: str, arguments: Mapping[str, Any]) -> None:
    """Raise for what shapes and dtypes alone show to be wrong; contents would have to be waited for.

    Raises:
        InputError: naming op, argument and the permitted values.
    """
    for name in INDICES:
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            raise InputError(f"kvpass::{op}: {name} is {dtype_name(tensor.dtype)}; it must be int64 or int32")
    tree_mask = arguments.get("tree_mask")
    if tree_mask is not None and tree_mask.dtype != torch.bool:
        raise InputError(f"kvpass::{op}: tree_mask is {dtype_name(tree_mask.dtype)}; it must be bool")
    for name in ("cos", "sin"):
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype != torch.float32:
            raise InputError(f"kvpass::{op}: {name} is {dtype_name(tensor.dtype)}; it must be float32")
    chunk = arguments.get("chunk")
    if chunk is not None and chunk < 1:
        raise InputError(f"kvpass::{op}: chunk is {chunk}; it must be at least 1")
    if "query" in arguments:
        _check_devices(op, arguments)


def _check_devices(op: str, arguments: Mapping[str, Any]) -> None:
    device = arguments["query"].device
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device != device:
            raise InputError(f"kvpass::{op}: {name} is on {value.device}; it must be on {device}, where the query is")
