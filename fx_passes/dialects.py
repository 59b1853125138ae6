"""What holds of a graph at each place of its way: the contracts between passes, as code.

The rules are cheap looks at every node. They do not prove anything again: they find the pass that left something which
the next one does not expect.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.graph import CapturedGraph, Role, arguments, aten, is_call, role_of, shape_of
from kvpass.fx_passes.masks.read_masks import MASK
from kvpass.fx_passes.pipeline import Dialect
from kvpass.fx_passes.token_axis.axes import is_free
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from kvpass.types import MaskMeaning

Complaints = Iterator[tuple[Node | None, str]]
READS = (torch.ops.kvpass.paged_attention, torch.ops.kvpass.latent_attention)
ARITHMETIC = ("_operator", "math", "torch", "torch.fx.experimental.sym_node")  # modules of functions of sizes
WRITES = (torch.ops.kvpass.write_cache, torch.ops.kvpass.norm_rotary_write)


def calls_are_ops(captured: CapturedGraph) -> Complaints:
    """Every call is an op of torch's, or arithmetic on sizes; every value is known as a fake one."""
    for node in captured.graph.nodes:
        if node.op in ("call_method", "call_module"):
            yield node, f"is a {node.op}"
        elif node.op == "call_function":
            target = node.target
            arithmetic = getattr(target, "__module__", "") in ARITHMETIC
            if not isinstance(target, (OpOverload, HigherOrderOperator)) and not arithmetic:
                yield node, "calls something that is no op"
            elif "val" not in node.meta and node.users:
                yield node, "has no fake value"


def inputs_have_roles(captured: CapturedGraph) -> Complaints:
    """Every placeholder says what it is, and there is one for the token ids."""
    roles = {node: role_of(node) for node in captured.graph.nodes if node.op == "placeholder"}
    for node, role in roles.items():
        if role is None:
            yield node, "is an input without a role"
    if list(roles.values()).count(Role.TOKENS) != 1:
        yield None, "it has not one input of token ids"


def only_served_inputs(captured: CapturedGraph) -> Complaints:
    """Parameters, sizes and masks of ones were taken in; what is left is token ids and positions."""
    for node in captured.graph.nodes:
        if node.op == "placeholder" and role_of(node) not in (Role.TOKENS, Role.POSITIONS):
            yield node, "is an input that no step brings along"


def logits_of_every_token(captured: CapturedGraph) -> Complaints:
    """The graph returns logits ``[batch, length, V]``."""
    shape = shape_of(captured.output)
    if len(shape) != 3 or shape[:2] != (captured.batch, captured.length) or not shape[2].is_number:
        yield captured.output, f"has the shape {list(shape)}, and is no logits [batch, length, V]"


def sites_are_canonical(captured: CapturedGraph) -> Complaints:
    """Operands of every attention are ``[batch, heads, length, width]``, query heads a multiple of those of keys."""
    for site in attention_sites(captured):
        named = arguments(site)
        shapes = [shape_of(named[part]) for part in ("query", "key", "value")]
        if any(len(s) != 4 or s[0] != captured.batch or s[2] != captured.length for s in shapes):
            yield site, "has operands that are not [batch, heads, length, width]"
        elif shapes[0][3] != shapes[1][3] or shapes[1][1] != shapes[2][1] or shapes[0][1] % shapes[1][1] != 0:
            yield site, "has operands whose heads or widths do not go together"


def no_attention_is_left(captured: CapturedGraph) -> Complaints:
    """``scaled_dot_product_attention`` runs over constants or a token's own heads, if anywhere."""
    inference = captured.analysis(token_axes)
    for node in captured.graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention):
            axes = inference.results.get(arguments(node)["key"])
            if not isinstance(axes, tuple) or not is_free(axes[-2]):
                yield node, "is an attention over tokens that is not canonical"


def masks_are_read(captured: CapturedGraph) -> Complaints:
    """Every attention carries what its mask means."""
    for site in attention_sites(captured):
        if not isinstance(site.meta.get(MASK), MaskMeaning):
            yield site, "has a mask that was not read"


def caches_are_inserted(captured: CapturedGraph) -> Complaints:
    """No attention over whole sequences is left, and each read stands behind the write of what it reads."""
    for site in attention_sites(captured):
        yield site, "is an attention over whole sequences"
    written: set[Node] = set()
    for node in captured.graph.nodes:
        if is_call(node, *WRITES):
            written.update(arguments(node)[part] for part in ("key_cache", "value_cache"))
        elif is_call(node, *READS):
            named = arguments(node)
            read = [named[part] for part in ("key_cache", "value_cache", "cache") if part in named]
            if any(role_of(cache) is not Role.CACHE for cache in read):
                yield node, "reads something that is no cache"
            elif not set(read) <= written:
                yield node, "reads a cache before it is written"


def positions_are_given(captured: CapturedGraph) -> Complaints:
    """Nothing counts the tokens of a step: where a token stands is an input. Rows routed to experts are numbered."""
    for node in captured.graph.nodes:
        if is_call(node, aten.arange) and shape_of(node) == (captured.length,):
            yield node, "counts the tokens of the step"


CAPTURED = Dialect("a captured graph", (inputs_have_roles, logits_of_every_token))
TAKEN_IN = Dialect("a graph of token ids", (inputs_have_roles, only_served_inputs, logits_of_every_token))
CANONICAL = Dialect("canonical", (*TAKEN_IN.rules, calls_are_ops))
DENSE = Dialect("a graph of dense attention", (*CANONICAL.rules, sites_are_canonical))
PROVEN = Dialect("proven", (*DENSE.rules, no_attention_is_left, masks_are_read))
PAGED = Dialect("a paged step", (inputs_have_roles, calls_are_ops, caches_are_inserted, positions_are_given))
