"""Random chains of ops on `x [B, S, 6]`, in which one operand that acts as a weight is made of all the tokens.

A chain is Python text: what is drawn is what is printed. `judge` captures many of them at once, takes their labels from
`token_axes`, and trusts none: what is accepted must keep tokens apart when any other is replaced, and at other lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.errors import KvpassError
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.token_axis.axes import Axes, Mixed
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from tests.attack.operand_parts import MOVES, OPS, OWN, PLAIN, SPREAD, WHOLE, Op
from tests.attack.verdict import Verdict
from tests.fx_passes.token_axis.test_axis_rules import rows
from tests.fx_passes.tracing import VOCAB, Cases, captured, outputs

BATCH, LENGTH = 2, 6
SHAPES = ((2, 4), (1, 6), (1, 1), (2, 2))  # corners of the ids that must give the same rows
SAME = 1e-9  # results are float64


@dataclass(frozen=True)
class Chain:
    """One example.

    Attributes:
        number: it was drawn with.
        control: the operand is a parameter, or made of the same token.
        text: source of the function.
    """

    number: int
    control: bool
    text: str

    def function(self) -> Callable[[Cases, Tensor], Tensor]:
        """The chain as a case of `Cases`."""
        space: dict[str, object] = {"torch": torch, "F": F}
        exec(self.text, space)
        return space["chain"]  # type: ignore[return-value]


def _parameter(kind: str, draw: random.Random) -> str:
    """A weight of a kind, from the parameters of `Cases`."""
    return draw.choice(
        {
            "s": ["m.vector[2].abs()", "m.vector.norm()", "m.square.mean()"],
            "v": ["m.vector", "m.square[1]", "m.table[3]", "m.vector.abs()", "m.square.mean(0)"],
            "m": ["m.square", "m.experts[2]", "m.table[4:10]", "m.square.T"],
        }[kind]
    )


def _of_all(kind: str, draw: random.Random) -> str:
    """A weight of a kind that every token has a part in."""
    plain, of = _parameter(kind, draw), {"s": ["s"], "v": ["s", "v"], "m": ["s", "v", "m"]}[kind]
    part = draw.choice(of)
    whole = draw.choice(WHOLE[part])
    if part == "v" and kind == "m":
        return draw.choice([f"torch.outer({whole}, m.vector)", f"{plain} + {whole}", f"torch.diag({whole})"])
    if part == kind and draw.random() < 0.5:
        return whole
    return draw.choice([f"{plain} * {whole}", f"{plain} + {whole}", f"{plain} - 0.5 * {whole}"])


def draw_chain(number: int) -> Chain:
    """The chain of a number; every other one is a control."""
    draw = random.Random(number)
    control = draw.random() < 0.5
    lines = [f"x = {draw.choice(PLAIN)}" for _ in range(draw.randrange(2))]
    op: Op = draw.choice(OPS)
    if control:
        weight = draw.choice(OWN) if op.kind == "v" and op.broadcasts and draw.random() < 0.5 else None
        of_token = weight is not None
        weight = weight or _parameter(op.kind, draw)
    else:
        of_token = op.kind == "v" and op.broadcasts and draw.random() < 0.35
        weight = draw.choice(SPREAD) if of_token else _of_all(op.kind, draw)
    lines.append(f"w = {weight}")
    if op.kind == "v":
        lines += [f"w = {draw.choice(MOVES)}" for _ in range(draw.randrange(3))]
    lines.append(f"x = {op.text}")
    for _ in range(draw.randrange(3)):
        after: Op = draw.choice(OPS)
        if draw.random() < 0.5:
            lines += [f"w = {_parameter(after.kind, draw)}", f"x = {after.text}"]
        else:
            lines.append(f"x = {draw.choice(PLAIN)}")
    body = "\n".join(f"    {line}" for line in ("t = x", *lines, "return x"))
    return Chain(number, control, f"def chain(m, x):\n{body}\n")


def judge(chains: Sequence[Chain]) -> Iterator[Verdict]:
    """The verdicts on chains that share one capture; where that fails, on each half of them."""
    functions = {str(chain.number): chain.function() for chain in chains}
    model = Cases(functions)
    try:
        graph = captured(model)
    except KvpassError as error:
        if len(chains) == 1:
            yield Verdict(chains[0].number, "refused", chains[0].control, str(error)[:200], chains[0].text)
            return
        for half in (chains[: len(chains) // 2], chains[len(chains) // 2 :]):
            yield from judge(half)
        return
    Canonicalize().apply(graph)
    results = token_axes(graph).results
    labels = [results[node] for node in outputs(graph)[1:]]
    accepted = {i: label for i, label in enumerate(labels) if isinstance(label, tuple)}
    faults = _faults(model, graph.module, accepted)
    for i, (chain, label) in enumerate(zip(chains, labels, strict=True)):
        if isinstance(label, tuple):
            outcome, detail = ("wrong", faults[i]) if i in faults else ("right", "")
        else:
            outcome, detail = "refused", label.reason if isinstance(label, Mixed) else str(label)
        yield Verdict(chain.number, outcome, chain.control, detail, chain.text)


@torch.no_grad()
def _faults(model: Cases, rewritten: torch.nn.Module, accepted: dict[int, Axes]) -> dict[int, str]:
    """What is wrong with accepted labels, by the place of the chain."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    found: dict[int, str] = {}

    def run(given: Tensor) -> dict[int, Tensor]:
        """Rows `[B, S, n]` of the model itself, compared with those of the captured graph."""
        values = [results[1:] for results in (model(given), rewritten(given))]
        for i in accepted:
            if apart(values[0][i], values[1][i]) > SAME:
                found.setdefault(i, f"the captured graph has another value at {tuple(given.shape)}")
        return {i: rows(values[0][i], axes, *given.shape) for i, axes in accepted.items()}

    whole = run(ids)
    for batch, length in SHAPES:
        part = run(ids[:batch, :length])
        for i in accepted:
            if apart(part[i], whole[i][:batch, :length]) > SAME:
                found.setdefault(i, f"{batch} sequences of {length} tokens give other rows")
    for hit in range(BATCH * LENGTH):
        for step in (7, 18):
            other = ids.clone()
            other.view(-1)[hit] = (other.view(-1)[hit] + step) % VOCAB
            moved = run(other)
            for i in accepted:
                before, after = (r[i].flatten(0, 1).clone() for r in (whole, moved))
                before[hit] = after[hit] = 0
                if apart(before, after) > SAME:
                    found.setdefault(i, f"another id at {divmod(hit, LENGTH)} moves the rows of other tokens")
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference; where one is no number or infinite the other must be the same."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.to(torch.float64), other.to(torch.float64)
    same = (one == other) | (one.isnan() & other.isnan())
    off = torch.where(same, 0.0, (one - other).abs() / other.abs().clamp(min=1)).nan_to_num(torch.inf)
    return float(off.max()) if off.numel() else 0.0
