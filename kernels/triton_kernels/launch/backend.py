"""The Triton backend: the ops' names and signatures, on CUDA and HIP devices.

Nothing here waits for the device: grids come from shapes, so that a CUDA graph can record a call and replay it with
other lengths and blocks. With ``TRITON_INTERPRET=1`` it serves CPU tensors too, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.formats.settling import open_for_write
from kvpass.kernels.triton_kernels.launch.attention_call import (
    AttentionCall,
    Features,
    find_positions,
    lay_out_attention,
    lay_out_cascade,
    lay_out_mass,
)
from kvpass.kernels.triton_kernels.launch.cache_calls import (
    Rotation,
    lay_out_copy,
    lay_out_gather,
    lay_out_settle,
    lay_out_write,
)
from kvpass.kernels.triton_kernels.launch.launch import INTERPRETED, find_target
from kvpass.kernels.triton_kernels.launch.limits import check_arguments, explain_refusal
from kvpass.kernels.triton_kernels.launch.stored import Stored, see_cache, see_for_write


def available() -> bool:
    """Whether kernels can run here: there is a GPU, or Triton's interpreter is on."""
    return INTERPRETED or torch.cuda.is_available()


def why_unavailable() -> str:
    """What :func:`available` found missing."""
    return "PyTorch sees no CUDA or HIP device"


def unsupported(op: str, **arguments: Any) -> str | None:
    """Why a call cannot be served, or None."""
    return explain_refusal(op, arguments)


def write_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_format: str | None = None,
    value_format: str | None = None,
) -> None:
    """``kvpass::write_cache`` in one launch."""
    check_arguments("write_cache", locals())
    keys, values, slots = _see_pair_for_write((key_cache, key_format), (value_cache, value_format), slot_mapping)
    lay_out_write(_in_rows(key), _in_rows(value), keys, values, slots).run()


def norm_rotary_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool = False,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::norm_rotary_write`` in one launch."""
    check_arguments("norm_rotary_write", locals())
    keys, values, slots = _see_pair_for_write((key_cache, key_format), (value_cache, value_format), slot_mapping)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    rotation = Rotation(
        _in_rows(query), out, _packed(query_weight), _packed(key_weight), eps, _packed(cos), _packed(sin), interleaved
    )
    lay_out_write(_in_rows(key), _in_rows(value), keys, values, slots, rotation).run()
    return out


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
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::paged_attention`` in three launches: schedule, attention, merge."""
    check_arguments("paged_attention", locals())
    features = _features(softcap, window, slopes, sinks, bias, chunk, tree_mask)
    step = (block_tables, seq_lens, query_start)
    call = _paged_call(
        "paged_attention", query, key_cache, value_cache, step, scale, features, (key_format, value_format)
    )
    return _attend(call, None)[0]


def paged_attention_stats(
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
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kvpass::paged_attention_stats``; the mass takes one more launch, which reads the keys again."""
    check_arguments("paged_attention_stats", locals())
    features = _features(softcap, window, slopes, sinks, bias, chunk, tree_mask)
    step = (block_tables, seq_lens, query_start)
    formats = (key_format, value_format)
    call = _paged_call("paged_attention_stats", query, key_cache, value_cache, step, scale, features, formats)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    out, positions = _attend(call, lse)
    if not mass:
        return out, lse, query.new_zeros(0, dtype=torch.float32)
    slots = block_tables.shape[1] * call.block_size
    received = query.new_zeros(seq_lens.shape[0], call.heads, slots, dtype=torch.float32)
    if query.shape[0]:
        lay_out_mass(call, lse, received, find_target(query.device), positions).run()
    return out, lse, received


def latent_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    value_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    format: str | None = None,
) -> Tensor:
    """``kvpass::latent_attention``: each row of the cache is read once, as key and as value."""
    check_arguments("latent_attention", locals())
    features = _features(softcap, window, slopes, sinks, bias, chunk, None)
    stored = see_cache(cache, format, find_target(query.device))
    tables, lens, starts = (tensor.contiguous() for tensor in (block_tables, seq_lens, query_start))
    call = AttentionCall(_in_rows(query), stored, stored, value_dim, tables, lens, starts, float(scale), features)
    return _attend(call, None)[0]


def cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    shared_start: Tensor,
    shared_lens: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::cascade_attention``: shared keys once per group. With a window or a chunk, :func:`paged_attention`."""
    check_arguments("cascade_attention", locals())
    features = _features(softcap, window, slopes, sinks, bias, chunk, None)
    step = (block_tables, seq_lens, query_start)
    formats = (key_format, value_format)
    shared = (shared_start.contiguous(), shared_lens.contiguous())
    call = _paged_call("cascade_attention", query, key_cache, value_cache, step, scale, features, formats, shared)
    if window is not None or chunk is not None or shared_lens.shape[0] == 0:
        return _attend(call, None)[0]
    out = query.new_empty(*query.shape[:2], call.value_dim)
    if query.shape[0]:
        for launch in lay_out_cascade(call, out, find_target(query.device)):
            launch.run()
    return out


def gather_cache(
    cache: Tensor, block_tables: Tensor, seq_lens: Tensor, width: int, format: str | None = None
) -> Tensor:
    """``kvpass::gather_cache``: float32 ``[N, W * P, Hkv, D]``."""
    check_arguments("gather_cache", locals())
    stored = see_cache(cache, format, find_target(cache.device))
    sequences, columns = block_tables.shape
    out = cache.new_empty(sequences, columns * cache.shape[2], cache.shape[1], width, dtype=torch.float32)
    lay_out_gather(stored, block_tables.contiguous(), seq_lens.contiguous(), out).run()
    return out


def copy_blocks(caches: list[Tensor], source: Tensor, target: Tensor) -> None:
    """``kvpass::copy_blocks``: two launches per tensor, since blocks may be exchanged."""
    check_arguments("copy_blocks", locals())
    for cache in caches:
        for launch in lay_out_copy(cache, source.contiguous(), target.contiguous()):
            launch.run()


def settle_blocks(caches: list[Tensor], formats: list[str], source: Tensor, target: Tensor) -> None:
    """``kvpass::settle_blocks``: two launches per tensor, since blocks may be exchanged."""
    check_arguments("settle_blocks", locals())
    for cache, name in zip(caches, formats, strict=True):
        stored = see_cache(cache, name, find_target(cache.device))
        for launch in lay_out_settle(stored, source.contiguous(), target.contiguous()):
            launch.run()


def _see_pair_for_write(
    keys: tuple[Tensor, str | None], values: tuple[Tensor, str | None], slot_mapping: Tensor
) -> tuple[Stored, Stored, Tensor]:
    """Both caches and the slots as the kernels take them: of settling formats the wide blocks."""
    if keys[1] == "k4":
        key_cache, value_cache, slot_mapping = open_for_write(keys[0], values[0], slot_mapping)
        keys, values = (key_cache, None), (value_cache, None)
    return see_for_write(*keys), see_for_write(*values), slot_mapping.contiguous()


def _features(
    softcap: float | None,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    chunk: int | None,
    tree_mask: Tensor | None,
) -> Features:
    return Features(softcap, window, _packed(slopes), _packed(sinks), _packed(bias), chunk, _packed(tree_mask))


def _paged_call(
    op: str,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    step: tuple[Tensor, Tensor, Tensor],
    scale: float,
    features: Features,
    formats: tuple[str | None, str | None],
    shared: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    target = find_target(query.device)
    keys = see_cache(key_cache, formats[0], target)
    values = see_cache(value_cache, formats[1], target)
    tables, lens, starts = (tensor.contiguous() for tensor in step)
    return AttentionCall(
        _in_rows(query), keys, values, values.width, tables, lens, starts, float(scale), features, shared
    )


def _attend(call: AttentionCall, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Output and, if a tree needs them, positions."""
    query = call.query
    out = query.new_empty(*query.shape[:2], call.value_dim)
    if not query.shape[0] or not call.seq_lens.shape[0]:
        return out.zero_(), None
    target, positions = find_target(query.device), None
    if call.features.tree_mask is not None:
        positions, launch = find_positions(call)
        launch.run()
    for launch in lay_out_attention(call, out, lse, target, positions):
        launch.run()
    return out, positions


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _in_rows(tensor: Tensor) -> Tensor:
    """``[T, H, D]`` whose last dim is contiguous; tokens and heads may be strided."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
