"""What the owner of a custom op knows of it, told to kvpass: models with kernels of their own go through the proof.

A declaration is no proof. It is checked on the model's own tensors whenever a model that calls the op is compiled, and
``engine.report.declared`` names every op that was taken by declaration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from kvpass.errors import InputError
from kvpass.fx_passes.op_facts.declared import DECLARED, MEANINGS, DeclaredFacts
from kvpass.fx_passes.op_facts.facts import OpKind


def declare_tokenwise(op: str, tokens: Sequence[str], dim: int | Sequence[int] = -1) -> None:
    """Declare that an op computes each row of its operands by itself, such as a linear map with packed weights.

    Args:
        op: the op's name as torch knows it, ``"mylib::quantised_linear"``; it needs a fake implementation.
        tokens: names in the op's schema of the operands that may carry tokens. All others have to be constants.
        dim: the dims of these operands that the op works along, counted from the end: the features. Every other dim
            is kept by the results, which have as many dims.

    Raises:
        InputError: if there is no such op, it has no such operands, or it is one of torch's own.
    """
    packet = _packet(op)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not tokens or not dims or any(d >= 0 for d in dims):
        raise InputError(
            f"declare_tokenwise({op!r}, tokens={tuple(tokens)}, dim={dim}): name the operands that carry tokens, and "
            "the dims that are features counted from the end, such as -1"
        )
    for overload in packet.overloads():
        names = [argument.name for argument in getattr(packet, overload)._schema.arguments]
        unknown = [name for name in tokens if name not in names]
        if unknown:
            raise InputError(f"{op} has no operand {unknown[0]!r}: it takes {', '.join(names)}")
    DECLARED[packet] = DeclaredFacts(OpKind.PARAMETRIC, "declared_rows", tokens=tuple(tokens), dims=dims)


def declare_meaning(op: str, as_aten: Callable[..., Any]) -> None:
    """Declare that an op means what a function of torch's own ops computes, such as an attention by a kernel.

    The function takes the place of the op before anything is proven, and what the rewritten model computes is the
    function.

    Args:
        op: the op's name as torch knows it, ``"flash_attn::fwd"``; it needs a fake implementation.
        as_aten: takes the op's arguments, and gives results of the same shapes and dtypes.

    Raises:
        InputError: if there is no such op, or it is one of torch's own.
    """
    if not callable(as_aten):
        raise InputError(f"declare_meaning({op!r}, as_aten={as_aten!r}): give a function of torch's own ops")
    MEANINGS[_packet(op)] = as_aten


def declare_known_ops() -> None:
    """Declare the ops of libraries that kvpass knows, where these are loaded: each is checked as any other is."""
    grouped = getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None)
    if isinstance(grouped, OpOverloadPacket):
        tokens = ("input", "offs")
        DECLARED[grouped] = DeclaredFacts(OpKind.ROUTING, "grouped_product", tokens=tokens, reference=_grouped_product)


def _grouped_product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Rows ``[T, in]`` times the matrix of their group, of ``[G, in, out]``; groups end where ``offs [G]`` says."""
    starts = [0, *offs.tolist()]
    parts = [input[start:end] @ weight[i] for i, (start, end) in enumerate(itertools.pairwise(starts))]
    return torch.cat([*parts, input[starts[-1] :] @ weight[-1] * 0])


def _packet(op: str) -> OpOverloadPacket:
    namespace, _, name = op.partition("::")
    if namespace in ("aten", "prim", "prims", "kvpass"):
        raise InputError(f"{op} is no op of yours: what it means is known, and cannot be declared")
    found = getattr(getattr(torch.ops, namespace, None), name, None) if name else None
    if not isinstance(found, OpOverloadPacket):
        raise InputError(f'there is no op {op!r}: register it first, and write its name as "namespace::name"')
    return found
