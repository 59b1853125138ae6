"""What is known of an op, in one row: what kind of op it is, which operands may carry tokens, and which rules read it.

:data:`kvpass.fx_passes.op_facts.table.FACTS` holds a row for each ATen op, by its overload packet: the op itself and
never its name, so that an op of somebody else's with a familiar name is known by nobody. Ops of other namespaces have
the facts that were declared for them (:mod:`kvpass.fx_passes.op_facts.declared`). An op without facts is proven by no
pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Enum, auto

from torch._ops import OpOverload, OpOverloadPacket


class OpKind(Enum):
    """What an op does to entries."""

    POINTWISE = auto()  # each entry of the result from the entries of the operands at its place, which broadcast
    PARAMETRIC = auto()  # elementwise in one operand; the others are parameters
    MOVE = auto()  # entries of the operands in other places, nothing computed
    CONTRACTION = auto()  # products summed over a dim
    REDUCTION = auto()  # dims vanish, or are 1
    ALONG = auto()  # works along a dim and keeps the others: softmax, running sums, sorts
    NORMALISATION = auto()
    CONVOLUTION = auto()
    LOOKUP = auto()  # entries picked by index
    SCATTER = auto()  # entries written by index
    ROUTING = auto()  # rows of tokens picked, counted or grouped by data
    CREATION = auto()  # made of sizes and numbers
    SIZE = auto()  # a number of the operand's shape
    ATTENTION = auto()
    ASSERTION = auto()


@dataclass(frozen=True)
class OpFacts:
    """One row.

    Attributes:
        kind: what the op does.
        axes: name of its rule in ``token_axis.axis_rules.AXIS_RULES``; empty where nothing is proven of it.
        tokens: operands that may carry tokens, by their names in the op's schema; None for all of them. All others
            must be constants: what they are may depend neither on the tokens nor on a position, the length or the
            batch. Checked in one place, before the rule is asked (``token_axis.infer_axes``).
        fresh: the entries of the operand do not matter, only its shape, dtype and device.
        random: draws random numbers.
        numbered: may be run on numbered entries, to see where each goes: a move on integers as on floats.
        view: looks at its operand's memory in another way, and launches nothing.
        analytic: an analytic function of its operands, or a move: two of them that agree at a random point agree
            wherever they are defined. A clamp or a comparison is none.
        spreads: hands its operand's entries on, as often as the result's shape asks.
        arranges: its numbers are dims, sizes and fills, with which no index is compared.
    """

    kind: OpKind
    axes: str = ""
    tokens: tuple[str, ...] | None = None
    fresh: bool = False
    random: bool = False
    numbered: bool = False
    view: bool = False
    analytic: bool = False
    spreads: bool = False
    arranges: bool = False


def packet_of(target: object) -> OpOverloadPacket | None:
    """The op that a node's target is an overload of; None for what is no op of torch's."""
    found = target.overloadpacket if isinstance(target, OpOverload) else target
    return found if isinstance(found, OpOverloadPacket) else None


def is_item_of(target: object) -> bool:
    """Whether a target takes one of several results."""
    return target is operator.getitem
