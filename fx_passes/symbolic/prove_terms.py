"""Claims about terms, proven for all positions and lengths by an SMT solver (z3), or refuted by an example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

import z3

from kvpass.fx_passes.graph import HORIZON
from kvpass.fx_passes.symbolic.index_terms import RANGES, Term, negate, operands

# A query ends after this much of the solver's own work, which does not depend on how busy the machine is; it is a
# few hundred milliseconds. The clock is the second line of defence.
WORK = 3_000_000
MILLISECONDS = 3_000
# Lengths at which it may give up before a search for the longest one that is proven ends.
PATIENCE = 3

Example = dict[str, int]


class UndecidedError(Exception):
    """The solver did not come to an end."""


@dataclass(frozen=True)
class Reach:
    """How far a claim holds.

    Attributes:
        proven: it is proven up to this length; HORIZON for every length, 0 for none.
        refuted: the shortest length found at which it does not hold; None where it is proven, or the solver gave up.
    """

    proven: int
    refuted: int | None = None

    @property
    def limit(self) -> int | None:
        """The length up to which it is proven; None for every one."""
        return None if self.proven == HORIZON else self.proven


class Prover:
    """Decides claims over positions of one sequence, ``0 <= q, k, ... < S``, and over a sequence ``0 <= b < B``."""

    def __init__(self) -> None:
        # A context of its own: z3's default one may be used by one thread only.
        self._context = z3.Context()
        self._variables: dict[str, Any] = {}
        self._known: dict[str, Any] = {}

    def refute(self, claim: Term, given: Iterable[Term] = (), longest: int = HORIZON) -> Example | None:
        """Values of the variables at which ``claim`` does not hold though all of ``given`` does; None proves it.

        Args:
            claim: a truth value.
            given: what is taken for granted.
            longest: for lengths ``1 <= S <= longest``.

        Raises:
            UndecidedError: if the solver gives up.
        """
        wrong = negate(claim)
        if wrong.op == "bool" and not wrong.args[0]:
            return None
        terms = [wrong, *given]
        names = sorted({"S"}.union(*(term.names | ({"B"} if "b" in term.names else set()) for term in terms)))
        solver = z3.Solver(ctx=self._context)
        solver.set("rlimit", WORK)
        solver.set("timeout", MILLISECONDS)
        length = self._variable("S")
        solver.add(length >= 1, length <= longest)
        for name in names:
            if name != "S":
                solver.add(self._variable(name) >= 0)
                solver.add(self._variable(name) <= RANGES[name][1] if name in RANGES else self._variable(name) < length)
        if "b" in names:
            solver.add(self._variable("b") < self._variable("B"))
        for term in terms:
            solver.add(self._translated(term))
        found = solver.check()
        if found == z3.unsat:
            return None
        if found != z3.sat:
            raise UndecidedError(claim.text)
        model = solver.model()
        return {name: model.eval(self._variable(name), model_completion=True).as_long() for name in names}

    def proves(self, claim: Term, given: Iterable[Term] = (), longest: int = HORIZON) -> bool:
        """Whether ``claim`` is proven; False as well where the solver gives up."""
        try:
            return self.refute(claim, given, longest) is None
        except UndecidedError:
            return False

    def holds_up_to(self, claim: Term, given: Iterable[Term] = (), longest: int = HORIZON) -> Reach:
        """How far ``claim`` is proven, of lengths up to ``longest``."""
        works, fails, undecided = 0, longest + 1, 0
        refuted: int | None = None
        end = longest
        while fails - works > 1 and undecided < PATIENCE:
            try:
                example = self.refute(claim, given, longest)
            except UndecidedError:
                undecided += 1
                fails = longest
            else:
                if example is None:
                    works = longest
                else:
                    fails = refuted = example["S"]
            longest = (works + fails) // 2
        return Reach(HORIZON if works == end else works, refuted)

    def _variable(self, name: str) -> Any:
        if name not in self._variables:
            self._variables[name] = z3.Int(name, ctx=self._context)
        return self._variables[name]

    def _translated(self, term: Term) -> Any:
        if term.text not in self._known:
            self._known[term.text] = self._translate(term)
        return self._known[term.text]

    def _translate(self, term: Term) -> Any:
        if term.op == "var":
            return self._variable(term.args[0])
        if term.op == "int":
            return z3.IntVal(term.args[0], ctx=self._context)
        if term.op == "bool":
            return z3.BoolVal(term.args[0], ctx=self._context)
        if term.op == "sum":
            return sum((self._translated(inner) * factor for inner, factor in term.args[0]), start=term.args[1])
        inner = [self._translated(part) for part in operands(term)]
        if term.op == "steps":
            value: Any = term.args[2][0]
            for start, later in zip(term.args[1][1:], term.args[2][1:], strict=True):
                value = z3.If(inner[0] >= start, z3.IntVal(later, ctx=self._context), value)
            return value
        if term.op in ("and", "or"):
            return reduce(and_ if term.op == "and" else or_, inner)
        return {
            "mul": lambda a, b: a * b,
            "div": lambda a, b: a / b,  # of integers by a number above 0: rounded down
            "min": lambda a, b: z3.If(a <= b, a, b),
            "max": lambda a, b: z3.If(a >= b, a, b),
            "if": z3.If,
            "le": lambda a: a <= 0,
            "eq": lambda a: a == 0,
            "not": z3.Not,
        }[term.op](*inner)
