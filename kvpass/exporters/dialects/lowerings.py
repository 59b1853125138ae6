"""How each op of kvpass is said in ops that other runtimes have: one table, ``LOWERINGS[op, dialect]``.

A *dialect* is what a family of formats can say. Its lowerings are functions that compute the op by calls that
``torch.export`` traces, from the op's arguments by their names, and from the :class:`Step` for what all layers share.
Caches are values: a write hands the new cache back, and says so by :meth:`Call.write`. What a dialect cannot say it
refuses by name, before anything is traced. A new dialect is one file and its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from kvpass.fx_passes.op_facts.table import facts_of

KVPASS = "kvpass::"
MEANT = ("grouped_product",)  # rules of op_facts that say all of what an op computes


@dataclass
class Step:
    """What one step of an exported program is made of, as values that are being traced.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``, of each token in its sequence.
        logits_index: int64 ``[R]``, the rows whose logits are wanted.
        seq_lens: int64 ``[N]``, lengths with the tokens of this step.
        query_start: int64 ``[N + 1]``; None in dialects of batches of equal width.
        block_tables: int64 ``[G, N, W]``; None in dialects without blocks.
        slot_mapping: int64 ``[G, T]``; likewise.
        fits: bool scalar, whether the inputs say a step that is proven; all logits are NaN where they do not.
        columns: int64 ``[M]``, counted from 0, M being the most tokens of a sequence; None where the graph finds it.
        width: tokens of each sequence, in dialects of batches of equal width.
        caches: the tensors of each cache as they are now, by the names of the graph's inputs.
        shared: what lowerings have worked out once for all layers.
    """

    token_ids: Tensor
    positions: Tensor
    logits_index: Tensor
    seq_lens: Tensor
    fits: Tensor
    query_start: Tensor | None = None
    block_tables: Tensor | None = None
    slot_mapping: Tensor | None = None
    columns: Tensor | None = None
    width: Any = None
    caches: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gave when it was first asked for under this name."""
        if name not in self.shared:
            self.shared[name] = compute()
        return self.shared[name]


@dataclass(frozen=True)
class Call:
    """One call of an op that a dialect has to say.

    Attributes:
        op: the op's name in the table.
        target: the op.
        given: its arguments by their names; caches as tuples of the tensors that hold them.
        caches: the graph's inputs that the arguments of caches are.
        step: what is shared by all calls.
    """

    op: str
    target: OpOverload
    given: Mapping[str, Any]
    caches: Mapping[str, str]
    step: Step

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def write(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        """Say what the cache that is the argument ``name`` holds from now on."""
        self.step.caches[self.caches[name]] = tensors

    def format_of(self, name: str) -> str | None:
        """The format of the cache that is the argument ``name``; None for what its dtype says."""
        named = self.given.get("format") if name == "cache" else self.given.get(name.replace("cache", "format"))
        return None if named is None else str(named)


Facts = Mapping[str, Any]  # the arguments of a call that are constants, by name; None for tensors that are not given


@dataclass(frozen=True)
class Lowering:
    """How a dialect says an op.

    Attributes:
        run: computes the op.
        cannot: what of a call it cannot say, as a phrase such as "a softcap"; None where it can.
    """

    run: Callable[[Call], Any]
    cannot: Callable[[Facts], str | None] = lambda facts: None


LOWERINGS: dict[tuple[str, str], Lowering] = {}


def lowers(
    op: str, dialect: str, cannot: Callable[[Facts], str | None] = lambda facts: None
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Decorate the function that says ``op`` in ``dialect``."""

    def register(run: Callable[[Call], Any]) -> Callable[[Call], Any]:
        LOWERINGS[op, dialect] = Lowering(run, cannot)
        return run

    return register


def find_lowering(op: str, dialect: str) -> Lowering | None:
    """The row of an op; None where the dialect has none."""
    return LOWERINGS.get((op, dialect))


def op_name(target: object) -> str | None:
    """The name under which the table knows what a node calls; None for ops that every format has.

    Ops of kvpass go by their name, ops of which it is known that they mean the same by that, others by all of it.
    """
    if not isinstance(target, OpOverload):
        return None
    facts = facts_of(target)
    if facts is not None and facts.axes in MEANT:
        return facts.axes
    name = str(target._schema.name)
    return {"aten": None, "kvpass": name.removeprefix(KVPASS)}.get(target.namespace, name)
