"""Random masks and position vectors, with or without one term that depends on the length.

What kvpass says of a mask is compared with the values of its graph at every length up to 130 and at lengths around the
mask's own numbers; what it rebuilds positions from, with the positions at those lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kvpass.fx_passes.graph import ROLE, CapturedGraph, Role, expression
from kvpass.fx_passes.masks import mask_meaning
from kvpass.fx_passes.masks.mask_meaning import meaning_rows
from kvpass.fx_passes.shape_values import shape_evaluator
from kvpass.fx_passes.symbolic.index_terms import UnreadableError
from kvpass.fx_passes.token_axis.axes import Mixed
from kvpass.fx_passes.token_axis.find_positions import SOURCE, Counting, Tabulated, longest_valid
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from kvpass.types import MaskMeaning
from tests.attack.length_parts import AFTER, CAUSAL, MOVED, POSITIONS, SHAPES, TERMS
from tests.attack.operands import apart
from tests.attack.verdict import Verdict
from tests.fx_passes.mask_tracing import TracedMask

EVERY, FARTHEST, DRAWN = 130, 700, 15
HIDDEN = 9984.0  # as far below the largest of its row a key counts as hidden
NUMBERS = (2, 3, 5, 7, 8, 13, 16, 31, 40, 64, 65, 77, 97, 100, 128, 129, 200, 257, 300, 411, 512, 600)
TABLE = torch.randn(800, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Example:
    """One mask or position vector.

    Attributes:
        number: it was drawn with.
        control: it has no term.
        mask: a mask; else positions.
        numbers: those drawn for it; lengths around them are tried.
        text: source of the function of batch and length.
    """

    number: int
    control: bool
    mask: bool
    numbers: tuple[int, ...]
    text: str

    def function(self) -> Callable[[Any, Any], Tensor]:
        """The mask or the positions at a batch size and a length."""
        space: dict[str, object] = {"torch": torch, "F": F, "TABLE": TABLE}
        exec(self.text, space)
        return space["made"]  # type: ignore[return-value]

    def lengths(self) -> list[int]:
        """The lengths at which it is tried."""
        draw, near = random.Random(self.number), {1}
        around = [*self.numbers, sum(self.numbers), self.numbers[0] * self.numbers[-1], 512, 256, FARTHEST]
        for _ in range(DRAWN):
            near.add(min(FARTHEST, max(1, draw.choice(around) * draw.choice((1, 1, 1, 2, 3)) + draw.randint(-2, 2))))
        return sorted(near | set(range(1, EVERY + 1)))


def draw_example(number: int) -> Example:
    """The mask or positions of a number."""
    draw = random.Random(number)
    control, mask = draw.random() < 0.3, draw.random() < 0.6
    k, w, r = draw.choice(NUMBERS), draw.choice(NUMBERS), draw.choice((2, 3, 5, 8, 13))
    term = "0" if control else draw.choice(TERMS)
    lines = [
        "n, i, j = torch.full((), s), torch.arange(s)[:, None], torch.arange(s)",
        f"d, K, W, R, A = i - j, {k}, {w}, {r}, {draw.choice((0.5, 0.25, 1.0, 0.07))}",
        f"T = {term}",
    ]
    if mask:
        lines.append(f"M = {draw.choice(CAUSAL)}")
        shapes = [t for t in SHAPES if "T" in t.replace("TABLE", "")] if not control and draw.random() < 0.5 else SHAPES
        shape = draw.choice(shapes)
        hidden = control or "T" in shape.replace("TABLE", "")
        last = shape if hidden else "M"
        if not hidden:
            lines.append(f"M = {draw.choice(AFTER)}")
            last = shape
        lines.append(f"return {last}")
    else:
        place = draw.choice(POSITIONS)
        hidden = control or "T" in place.replace("TABLE", "")
        lines.append(f"P = {place}")
        moves = [t for t in MOVED if "T" in t.replace("TABLE", "")]
        lines.append("return P" if hidden else f"return {draw.choice(MOVED if draw.random() < 0.2 else moves)}")
    body = "\n".join(f"    {line}" for line in lines)
    return Example(number, control, mask, (k, w, r), f"def made(b, s):\n{body}\n")


@contextmanager
def near_probes() -> Iterator[None]:
    """The library probes as far as the sweep looks, which is quicker."""
    with patch.object(mask_meaning, "ROUNDED_FROM", (256,)), patch.object(mask_meaning, "LONGEST", FARTHEST):
        yield


def judge(examples: Sequence[Example]) -> Iterator[Verdict]:
    """The verdicts, one after the other."""
    for example in examples:
        judged = _judge_mask if example.mask else _judge_positions
        with near_probes(), torch.no_grad():
            outcome, detail = judged(example)
        yield Verdict(example.number, outcome, example.control, detail, example.text)


def _judge_mask(example: Example) -> tuple[str, str]:
    try:
        traced = TracedMask(example.function())
    except Exception as error:  # what cannot be traced for every length is nothing that kvpass is shown
        return "refused", f"not traced: {type(error).__name__}: {error}"[:200]
    try:
        found = traced.meaning(max_length=FARTHEST)
    except UnreadableError:
        found = traced.meaning(max_length=FARTHEST, read=False)
    if isinstance(found, str):
        return "refused", found
    for length in example.lengths():
        if found.limit is not None and length > found.limit:
            break
        try:
            wanted = traced.evaluate(1, length).float()
        except Exception as error:
            return "wrong", f"{found.describe()} ({found.evidence}), but no value at {length}: {error}"[:400]
        wanted = wanted.expand(*wanted.shape[:-2], length, length).reshape(-1, length, length)
        if not _same(_described(found, length), wanted):
            return "wrong", f"{found.describe()} ({found.evidence}), but not at {length}"
    return "right", found.describe()


def _described(meaning: MaskMeaning, length: int) -> Tensor:
    """The bias `[1, S, S]` that a meaning stands for."""
    if meaning.bias is not None and meaning.bias.dim() == 3:
        table = meaning.bias[:, :length, :length]
        plain = MaskMeaning(window=meaning.window, chunk=meaning.chunk, slopes=meaning.slopes)
        return meaning_rows(plain, slice(0, length), length) + table
    bias = meaning_rows(meaning, slice(0, length), length)
    if meaning.prefix is not None:
        bias[..., : meaning.prefix] = bias[..., : meaning.prefix].masked_fill(
            bias[..., : meaning.prefix] == -torch.inf, 0.0
        )
    return bias


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Whether a softmax makes the same of two biases; rows that see nothing are no matter."""
    if bool(wanted.isnan().any()):
        return False
    tops = [bias.amax(-1, keepdim=True) for bias in (got, wanted)]
    seen = [bias > top - HIDDEN for bias, top in zip((got, wanted), tops, strict=True)]
    nothing = tops[1] == -torch.inf
    if not bool(((seen[0] == seen[1]) | nothing).all()):
        return False
    left, right = ((bias - top).masked_fill(~one, 0) for bias, top, one in zip((got, wanted), tops, seen, strict=True))
    size = wanted.masked_fill(~seen[1], 0).abs().amax().clamp(min=1)
    return bool((((left - right).abs() <= 1e-4 + 1e-6 * size) | nothing).all())


class TracedPositions:
    """The graph of ids plus positions `[S]` or `[B, S]`, traced without torch.export."""

    def __init__(self, positions: Callable[[Any, Any], Tensor]) -> None:
        def forward(ids: Tensor) -> Tensor:
            return ids.to(torch.float64) + positions(ids.shape[0], ids.shape[1])

        module = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.zeros(2, 11).long())
        (ids,) = module.graph.find_nodes(op="placeholder")
        fake = ids.meta["val"].fake_mode
        for node in module.graph.find_nodes(op="get_attr"):
            node.meta["val"] = fake.from_tensor(getattr(module, str(node.target)), static_shapes=True)
        ids.meta[ROLE] = Role.TOKENS
        batch, length = (expression(size) for size in ids.meta["val"].shape)
        self.captured = CapturedGraph(module, batch, length, {Role.TOKENS: ids})
        (self.output,) = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes


def _judge_positions(example: Example) -> tuple[str, str]:
    try:
        traced = TracedPositions(example.function())
    except Exception as error:  # what cannot be traced for every length is nothing that kvpass is shown
        return "refused", f"not traced: {type(error).__name__}: {error}"[:200]
    graph = traced.captured
    label = token_axes(graph).results[traced.output]
    if not isinstance(label, tuple):
        return "refused", label.reason if isinstance(label, Mixed) else str(label)
    evaluator = shape_evaluator(graph)
    sources = [n for n in graph.graph.nodes if SOURCE in n.meta and n.users]
    limit = min((longest_valid(evaluator, node, FARTHEST) for node in sources), default=FARTHEST)
    limit = min([limit, *(s.limit for n in sources if isinstance(s := n.meta[SOURCE], Counting) and s.limit)])
    if limit < 1:
        return "refused", "no length is left"
    lengths = [n for n in example.lengths() if n <= limit]
    wanted: dict[int, Tensor] = {}
    for n in lengths:
        try:
            wanted[n] = graph.module(torch.zeros(1, n, dtype=torch.int64))
        except Exception:  # a table that rules follow has its own limit: plan_cache.table_limit
            break
    tables = {n: evaluator.evaluate(n, 1, limit) for n in sources if isinstance(n.meta[SOURCE], Tabulated)}
    with graph.graph.inserting_after(graph.input_ids):
        given = graph.graph.placeholder("positions")
    with graph.fake_mode:
        given.meta["val"] = torch.empty(graph.input_ids.meta["val"].shape[1], dtype=torch.int64)
    for node in sources:
        source = node.meta[SOURCE]
        source = Tabulated(tables[node], source.dim) if node in tables else source
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(source.rebuild(graph, node, given))
    graph.tidy()
    kinds = ", ".join(sorted({type(n.meta[SOURCE]).__name__ for n in sources}))
    for n, value in wanted.items():
        try:
            got = graph.module(torch.zeros(1, n, dtype=torch.int64), torch.arange(n))
        except Exception as error:
            return "wrong", f"{kinds}: cannot be rebuilt at {n}: {error}"[:300]
        if apart(got, value) > 1e-5:
            return "wrong", f"{kinds}: rebuilt otherwise at {n}"
        # one by one, last token alone
        last = graph.module(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([n - 1]))
        if apart(last, value[:, -1:]) > 1e-5:
            return "wrong", f"{kinds}: the last of {n} by itself is another"
    return "right", f"{kinds} up to {limit}"
