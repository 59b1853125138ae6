"""``compare_capture``: the original against the graph that was captured of it, at lengths that the capture never saw.

A forward can notice that it is being exported, and be another function then. Nothing of the graph tells; so both are
run on the same texts, the longest beyond every number that the graph computes positions and masks with, and others as
long as each number that the code of the forward names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, LogitsRows, expression, numbers_in, tensor_value
from kvpass.fx_passes.validation.code_numbers import numbers_of_code
from kvpass.fx_passes.validation.verify import Comparison, allowed_tokens, most_of, row_errors
from kvpass.types import CachePlan

LONG = 2049  # tokens: one more than the largest size that code is likely to be written around
NUMBERS = 4096  # numbers up to this one are gone beyond
MARGIN = 8  # by so many tokens
SHORT = (1, 2, 3, 41)
EACH, REPEATED = 64, 12  # so many tokens, each this often by itself
SMALL = 20_000_000  # weights of a model that is run this often; a few tokens have to do for others
FEW = 3  # distinct tokens of a text with few
LARGEST = 1_100_000_000  # bytes of one tensor of such a run
WORK = 60_000_000  # numbers that a run computes, beyond which one long text has to do for all
ROWS = 256  # that are compared at once


@dataclass(frozen=True)
class Text:
    """Token ids ``[B, S]`` to compare with, and what they are."""

    name: str
    ids: Tensor


@torch.no_grad()
def compare_capture(
    original: Callable[[Tensor], Tensor], captured: CapturedGraph, plan: CachePlan, found: Comparison
) -> Comparison:
    """What was found, with the errors of the captured graph before the others.

    Args:
        original: the user's model: token ids ``[B, S]`` to logits in the rows that it returns.
        captured: as it was captured, before any pass.
        plan: tells tokens and lengths that are left out.
        found: gives the bound.
    """
    errors: dict[str, float] = {}
    numbers = numbers_of_code(original, next(texts(captured, plan)).ids[:, : SHORT[-1]])
    for text in texts(captured, plan, numbers):
        name, error = _compare(original, captured, text, found.share)
        errors[f"capture on {name}"] = max(error, errors.get(f"capture on {name}", 0.0))
    return Comparison(errors | found.errors, found.site_errors, found.tolerance, found.share, found.history_effect)


def texts(captured: CapturedGraph, plan: CachePlan, named: Collection[int] = ()) -> Iterator[Text]:
    """The texts, long ones first, since a model may remember the longest; the same for the same graph.

    Args:
        captured: as it was captured.
        plan: tells tokens and lengths that are left out.
        named: numbers of the code; the shorter ones of the lengths around them are compared, as far as work goes.
    """
    generator = torch.Generator().manual_seed(1)
    allowed = allowed_tokens(plan)
    device = captured.input_ids.meta["val"].device

    def drawn(length: int, among: Tensor = allowed) -> Tensor:
        return among[torch.randint(len(among), (1, length), generator=generator)].to(device)

    limits = [limit for limit in (captured.max_length, plan.max_length) if limit is not None]
    longest = min([longest_compared(captured), *limits])
    few, one = (drawn(FEW).flatten().cpu(), drawn(1).flatten().cpu())
    kinds = {"random tokens": allowed, "one token": one, f"{FEW} tokens": few}
    cuts = [longest * part // len(kinds) for part in range(len(kinds) + 1)]
    if longest > SHORT[-1] and sum(_numel(node, captured, longest) for node in captured.graph.nodes) <= WORK:
        for name, among in kinds.items():
            yield Text(f"{longest} times {name}", drawn(longest, among))
    elif longest > SHORT[-1]:
        parts = [
            drawn(stop - start, among) for (start, stop), among in zip(pairwise(cuts), kinds.values(), strict=True)
        ]
        yield Text(f"{longest} times {', then '.join(kinds)}", torch.cat(parts, 1))
    near = {number + off for number in named for off in (-1, 0, 1)} - set(SHORT)
    around, work = [], 0
    for length in sorted(n for n in near if 0 < n < longest):
        work += max(1, sum(_numel(node, captured, length) for node in captured.graph.nodes))
        if work > WORK:
            break
        around.append(length)
    for length in reversed(around):
        yield Text(f"texts of {len(around)} lengths at numbers of the code", drawn(length))
    short = [n for n in SHORT if n <= longest]
    for length in short:
        yield Text(f"texts of {', '.join(map(str, short))} tokens", drawn(length))
    weights = sum(parameter.numel() for parameter in captured.module.parameters())
    each = allowed[torch.randperm(len(allowed), generator=generator)[: EACH if weights <= SMALL else FEW]].to(device)
    for token in each:
        yield Text(f"{len(each)} tokens, each by itself", token.expand(1, min(REPEATED, longest)))
    yield Text("a last text, after many calls", drawn(short[-1]))


def longest_compared(captured: CapturedGraph) -> int:
    """A length beyond :data:`LONG` and the numbers of the graph, as far as memory goes."""
    numbers = {n for n in numbers_in(_apart_from_weights(captured), captured) if n <= NUMBERS}
    length = max(LONG, max(numbers, default=0) + MARGIN)
    while length > 1 and max(_bytes(node, captured, length) for node in captured.graph.nodes) > LARGEST:
        length = LONG if length > LONG else length * 7 // 8
    return length


def _apart_from_weights(captured: CapturedGraph) -> set[Node]:
    """The nodes that no parameter is part of: those of positions and masks, but for learned ones."""
    reached: set[Node] = set()
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(captured.module)
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                reached.add(node)
        elif any(used in reached for used in node.all_input_nodes):
            reached.add(node)
    return set(captured.graph.nodes) - reached


def _numel(node: Node, captured: CapturedGraph, length: int) -> int:
    """Numbers of a node's tensor for one sequence; those of weights do not count."""
    value = tensor_value(node)
    if value is None or node.op != "call_function":
        return 0
    count = sympy.sympify(1)
    for size in value.shape:
        count *= expression(size)
    count = count.subs({captured.batch: 1, captured.length: length})
    return int(count) if count.is_number else 0


def _bytes(node: Node, captured: CapturedGraph, length: int) -> int:
    value = tensor_value(node)
    return 0 if value is None else _numel(node, captured, length) * value.dtype.itemsize


def _compare(
    original: Callable[[Tensor], Tensor], captured: CapturedGraph, text: Text, share: float
) -> tuple[str, float]:
    """What was compared, and by how much original and graph differ; infinite where only one of them runs."""
    inputs = [text.ids]
    if captured.position_ids is not None:
        inputs.append(torch.arange(text.ids.shape[1], device=text.ids.device).expand_as(text.ids))
    try:
        wanted = original(text.ids)
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        return f"{text.name} (the original raises {type(error).__name__})", float("inf")
    got = captured.module(*inputs)[0]
    got = (got[:, -1:] if captured.rows is LogitsRows.LAST else got).flatten(0, 1)
    wanted = wanted.reshape(-1, wanted.shape[-1])
    if got.shape != wanted.shape:
        return text.name, float("inf")
    scale = max(float(torch.where(part.isfinite(), part, 0).abs().max()) for part in wanted.split(ROWS))
    errors = [_rows(g, w, scale or 1.0) for g, w in zip(got.split(ROWS), wanted.split(ROWS), strict=True)]
    return text.name, most_of(torch.cat(errors), share)


def _rows(got: Tensor, wanted: Tensor, scale: float) -> Tensor:
    """Errors by row; what is no finite number has to be the same."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    return row_errors(torch.where(same, 0, got), torch.where(same, 0, wanted).float(), scale)
