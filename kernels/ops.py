"""Schemas of the ``kvpass::`` ops and their registration.

Importing this module defines the ops; importing it again, under whatever name, changes nothing. The caches are explicit
mutable arguments: a graph that holds these ops can be functionalised, exported and compiled like any other, and no
compiler may drop or reorder a write. What each op means is written where its shape function is:
:mod:`kvpass.kernels.attention_ops` and :mod:`kvpass.kernels.cache_ops`. Who computes it is decided call by call in
:mod:`kvpass.kernels.backends`.

The ops are for inference. Under grad mode, and with parameters that require grad, they run and record nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpass.kernels.attention_ops import (
    fake_cascade_attention,
    fake_dense_attention,
    fake_latent_attention,
    fake_paged_attention,
    fake_paged_attention_stats,
)
from kvpass.kernels.backends import implementation_of
from kvpass.kernels.cache_ops import (
    fake_copy_blocks,
    fake_gather_cache,
    fake_norm_rotary_write,
    fake_settle_blocks,
    fake_write_cache,
)

_WRITE = "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping"
_STEP = "Tensor block_tables, Tensor seq_lens, Tensor query_start"
_CACHES = "Tensor query, Tensor key_cache, Tensor value_cache"
_FEATURES = (
    "float? softcap=None, int? window=None, Tensor? slopes=None, Tensor? sinks=None, Tensor? bias=None, int? chunk=None"
)
_FORMATS = "str? key_format=None, str? value_format=None"

SCHEMAS: dict[str, str] = {
    "dense_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, float? softcap=None,"
        " Tensor? sinks=None) -> Tensor"
    ),
    "write_cache": f"({_WRITE}, {_FORMATS}) -> ()",
    "paged_attention": (
        f"({_CACHES}, {_STEP}, float scale, {_FEATURES}, Tensor? tree_mask=None, {_FORMATS}) -> Tensor"
    ),
    "paged_attention_stats": (
        f"({_CACHES}, {_STEP}, float scale, {_FEATURES}, Tensor? tree_mask=None, {_FORMATS}, bool mass=False)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "latent_attention": (
        f"(Tensor query, Tensor cache, {_STEP}, float scale, int value_dim, {_FEATURES}, str? format=None) -> Tensor"
    ),
    "cascade_attention": (
        f"({_CACHES}, {_STEP}, Tensor shared_start, Tensor shared_lens, float scale, {_FEATURES}, {_FORMATS}) -> Tensor"
    ),
    "copy_blocks": "(Tensor(a!)[] caches, Tensor source, Tensor target) -> ()",
    "settle_blocks": "(Tensor(a!)[] caches, str[] formats, Tensor source, Tensor target) -> ()",
    "gather_cache": "(Tensor cache, Tensor block_tables, Tensor seq_lens, int width, str? format=None) -> Tensor",
    "norm_rotary_write": (
        f"(Tensor query, {_WRITE}, Tensor? query_weight, Tensor? key_weight, float eps, Tensor? cos, Tensor? sin,"
        f" bool interleaved=False, {_FORMATS}) -> Tensor"
    ),
}

FAKES: dict[str, Callable[..., object]] = {
    "dense_attention": fake_dense_attention,
    "write_cache": fake_write_cache,
    "paged_attention": fake_paged_attention,
    "paged_attention_stats": fake_paged_attention_stats,
    "latent_attention": fake_latent_attention,
    "cascade_attention": fake_cascade_attention,
    "copy_blocks": fake_copy_blocks,
    "settle_blocks": fake_settle_blocks,
    "gather_cache": fake_gather_cache,
    "norm_rotary_write": fake_norm_rotary_write,
}


def argument_names(name: str) -> tuple[str, ...]:
    """The arguments of ``kvpass::name`` in order."""
    schema = torch._C.parse_schema(f"kvpass::{name}{SCHEMAS[name]}")
    return tuple(argument.name for argument in schema.arguments)


def register_op(name: str) -> None:
    """Define ``kvpass::name`` unless it exists; the definition lives as long as the process."""
    if hasattr(torch.ops.kvpass, name):
        return
    qualname = f"kvpass::{name}"
    torch.library.define(qualname, SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualname, "default", implementation_of(name, argument_names(name), FAKES[name]))
    # Without this, torch would record the torch calls inside the op, and a written cache would come to require grad.
    torch.library.impl(qualname, "Autograd", torch.library.fallthrough_kernel)
    torch.library.register_fake(qualname, FAKES[name])


for _name in SCHEMAS:
    register_op(_name)
