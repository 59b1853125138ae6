"""Read what a mask or bias means from its values, whatever operations computed it.

The bias of an attention is a function of nothing but the batch and the length. Evaluated at well chosen lengths it is
compared with the known meanings, narrowest first: causal, sliding window, chunks, ALiBi (Press et al., "Train Short,
Test Long"), a bias that depends on the distance of query and key alone (T5), and at last any function of the two
positions, kept exactly as a table. What is none of these is refused, with the first place at which it goes wrong.

How far a meaning holds:

- Where the graph could be read as an expression (:mod:`kvpass.fx_passes.masks.prove_mask`), a solver proves the meaning
  of it, for every length or up to one. The expression must agree with the values at every probed length, or it is not
  used. A length at which the solver refutes a meaning is probed, where that is within reach: there the mask is refused,
  or turns out to mean something else.
- Where batch and length say how large the mask is and nothing else (:mod:`kvpass.fx_passes.symbolic.extents`), or the
  solver proves that its entries stay the same, a matrix has all shorter ones in its corner. So its meaning is exact up
  to the longest length that was evaluated; there it ends.
- Where neither is so the mask is refused: of the lengths between those that were probed nothing is known.
- Lengths just beyond every number of the graph, their sums and products are probed, so that the limit is one of use.
  bfloat16 and float16 cannot count beyond 256 and 2048, so these two lengths are always exceeded.
- A table holds for its own length, and a mask that has no value beyond some length, such as a buffer of fixed size,
  holds up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from math import inf, isqrt

import torch
from torch import Tensor

from kvpass.fx_passes.graph import DEFAULT_TABLE_LENGTH
from kvpass.fx_passes.masks.mask_probe import (
    BEYOND,
    LONGEST,
    PROBE_ENTRIES,
    ROUNDED_FROM,
    BiasMatrix,
    MaskProbe,
    NotProvenError,
    differs,
    probe_lengths,
    row_chunks,
    unproven,
)
from kvpass.fx_passes.masks.prefix_mask import find_prefix, with_prefix, without_prefix
from kvpass.fx_passes.masks.prove_mask import MaskExpression, holds_up_to, keeps_entries_up_to, prove_meaning
from kvpass.fx_passes.symbolic.prove_terms import Reach
from kvpass.types import MaskMeaning

# 512 MiB of float32.
TABLE_ENTRIES = 2**27
# Expression and values are compared entry by entry up to this length, and a proven meaning at every probed one.
LONGEST_COMPARED = 300
# Entries of a matrix at which a proven meaning is compared with the values beyond that length (128 MiB).
CHECKED_ENTRIES = 2**25
# No sequence is this long: such an integer is "to the end" of a slice, or what a mask writes for minus infinity.
ENDLESS = 2**24
# Smaller integers are dims, signs and off-by-ones far more often than sizes that hide behind another one.
SMALLEST_SIZE = 8
# A mask that is not known up to this length, though it was probed as far, is refused.
SHORTEST_LIMIT = 33
# How often a meaning may be refuted and replaced by the next.
MOST_REFUTATIONS = 4


def read_mask_meaning(
    evaluate: Callable[[int, int], Tensor],
    *,
    thresholds: Collection[int],
    absolute_scores: bool,
    num_heads: int,
    max_length: int | None,
    acts: str | None,
    expression: MaskExpression | None = None,
) -> MaskMeaning | str:
    """The meaning of a mask, or one sentence that says why it has none that could be proven.

    Args:
        evaluate: ``evaluate(batch, length)`` computes the additive bias, in any floating dtype, broadcastable to
            ``[batch, Hq, length, length]``. What it raises means that the mask has no value there.
        thresholds: every integer constant of the graph that computes the mask.
        absolute_scores: the softmax has sinks: a constant added to a row counts, and a row may see no key at all.
        num_heads: query heads Hq.
        max_length: length that a tabulated or an unproven bias has to cover; 2048 when None.
        acts: how the batch or the length acts on the entries; None where it says how large the mask is, nothing else.
        expression: what the graph was read as; None where it could not be read.

    Returns:
        The meaning, its tensors on the device on which the mask was evaluated, or the reason for refusal.
    """
    sizes = sorted({abs(threshold) for threshold in thresholds if abs(threshold) < ENDLESS})
    try:
        probe = MaskProbe(evaluate, num_heads, absolute_scores)
        return _read(probe, sizes, max_length, acts, expression)
    except NotProvenError as reason:
        prefix = find_prefix(evaluate, sizes)
        if prefix is None:
            return str(reason)
        probe = MaskProbe(without_prefix(evaluate, prefix), num_heads, absolute_scores)
    try:
        meaning = _read(probe, [*sizes, prefix], max_length, None, None)
    except NotProvenError as reason:
        return str(reason)
    return with_prefix(meaning, prefix, evaluate, expression, absolute_scores, acts)


def _read(
    probe: MaskProbe, sizes: list[int], max_length: int | None, acts: str | None, expression: MaskExpression | None
) -> MaskMeaning:
    lengths = probe_lengths([*sizes, *ROUNDED_FROM], min(LONGEST, probe.longest))
    for length in lengths:
        if length <= LONGEST_COMPARED:
            probe.extend(length)
    proven = None
    if expression is not None and not _agrees(expression, probe):
        expression = None
    if expression is None and acts is not None:
        raise NotProvenError(unproven(acts))
    if expression is not None:
        proven = prove_meaning(expression, probe.num_heads, probe.absolute_scores, max_length)
    heads = len(probe.largest.values)
    for length in lengths:
        # What is proven is checked as far as that is cheap.
        if length > LONGEST_COMPARED and (proven is None or heads * length**2 <= CHECKED_ENTRIES):
            probe.extend(length)
    if expression is not None and proven is not None:
        if _reproduces(proven, probe):
            return _with_proof(probe, proven, expression)
        expression = None  # proof and values contradict one another: values alone count
        for length in lengths:
            probe.extend(length)
    return _probed(probe, sizes, max_length, acts, expression)


def _with_proof(probe: MaskProbe, proven: MaskMeaning, expression: MaskExpression) -> MaskMeaning:
    """A proven meaning on the mask's device, as far as the graph has values."""
    device = probe.largest.values.device
    slopes, bias = (None if tensor is None else tensor.to(device) for tensor in (proven.slopes, proven.bias))
    ends = [proven.limit, None if probe.fails_at is None else probe.fails_at - 1]
    limit = min((end for end in ends if end is not None), default=None)
    notes = "".join(f"; {note}" for note in expression.notes)
    reach = "every length" if limit is None else f"every length up to {limit}"
    evidence = f"proven for {reach}; checked at S = {probe.tried()}{notes}"
    return replace(proven, slopes=slopes, bias=bias, limit=limit, evidence=evidence)


def _probed(
    probe: MaskProbe, sizes: list[int], max_length: int | None, acts: str | None, expression: MaskExpression | None
) -> MaskMeaning:
    """The meaning as far as values tell, or as far as the expression is proven to go on like that."""
    longest = min(LONGEST, probe.longest)
    exact = _exact_up_to(probe, acts, expression)
    meaning = recognise(probe.largest)
    if meaning.bias is None:
        farthest = max((size for size in _combined(sizes, meaning.window) if size < longest), default=0)
        if farthest >= probe.largest.length:
            meaning = recognise(probe.extend(min(farthest + BEYOND, longest)))
    if meaning.bias is None and max_length is not None and probe.largest.length < min(max_length, longest):
        meaning = recognise(probe.extend(min(max_length, longest)))
    reach = Reach(0)
    if expression is not None:
        meaning, reach, expression = _solved(probe, meaning, expression)
        if expression is None and acts is not None:
            raise NotProvenError(unproven(acts))
    if meaning.bias is not None:
        meaning = _tabulated(probe, meaning.bias, max_length)
    slopes = None if meaning.slopes is None else meaning.slopes.repeat(probe.num_heads // len(meaning.slopes))
    largest = probe.largest.length
    known = max(min(largest, exact), reach.proven)
    if known < min(largest, SHORTEST_LIMIT):
        assert acts is not None  # else all that was evaluated is exact
        raise NotProvenError(unproven(acts))
    ends = [meaning.limit, known, None if expression is None else expression.limit]
    limit = min(end for end in ends if end is not None)
    beyond = "" if probe.fails_at is None else f"; has no value at {probe.fails_at}"
    if reach.proven > largest:
        beyond += f"; proven up to {limit}" + (", and something else beyond" if reach.refuted is not None else "")
    elif acts is not None:
        beyond += f"; proven to keep its entries up to {limit}"
    return replace(meaning, slopes=slopes, limit=limit, evidence=probe.evidence() + beyond)


def _solved(
    probe: MaskProbe, meaning: MaskMeaning, expression: MaskExpression
) -> tuple[MaskMeaning, Reach, MaskExpression | None]:
    """How far a meaning is proven, evaluated where it is refuted; no expression where the values contradict it."""
    longest = min(LONGEST, probe.longest)
    for _ in range(MOST_REFUTATIONS):
        if meaning.bias is not None or meaning.slopes is not None:
            break
        reach = holds_up_to(expression, meaning, probe.absolute_scores)
        at = reach.refuted
        if at is None or at > longest or (probe.fails_at is not None and at >= probe.fails_at):
            return meaning, reach, expression
        before = probe.largest.length
        probe.extend(at)
        if at <= before:  # the values are what was found, and not what the expression says
            return meaning, Reach(0), None
        meaning = recognise(probe.extend(min(at + BEYOND, longest)))
    return meaning, Reach(0), expression


def _exact_up_to(probe: MaskProbe, acts: str | None, expression: MaskExpression | None) -> int:
    """The length up to which each matrix is known to be a corner of the next."""
    if acts is None:
        return ENDLESS
    if expression is None:
        return 0
    reach = keeps_entries_up_to(expression)
    if reach.refuted is not None and reach.refuted <= min(LONGEST, probe.longest):
        probe.extend(reach.refuted)
    return reach.proven


def _agrees(expression: MaskExpression, probe: MaskProbe) -> bool:
    """Whether the expression has the values of the graph, at every probed length that is quick to compare."""
    try:
        return all(
            probe.equals(expression.matrix(length)) for length in sorted(probe.lengths) if length <= LONGEST_COMPARED
        )
    except NotProvenError:
        return False


def _reproduces(meaning: MaskMeaning, probe: MaskProbe) -> bool:
    """Whether a proven meaning has the values of the largest probed matrix: proof and probe must agree."""
    matrix = probe.largest
    length = matrix.length if meaning.limit is None else min(meaning.limit, matrix.length)
    for rows in row_chunks(matrix.values[:, :length]):
        wanted = meaning_rows(meaning, rows, length).to(matrix.values.device)
        found = matrix.values[:, rows, :length]
        heads = max(len(found), len(wanted))
        shift = matrix.shift[:, rows, None].expand(heads, -1, -1)
        if bool(differs(found.expand(heads, -1, -1), wanted.expand(heads, -1, -1), shift, matrix.magnitude).any()):
            return False
    return True


def meaning_rows(meaning: MaskMeaning, rows: slice, length: int) -> Tensor:
    """The bias ``[1 | Hq, r, S]`` of some rows that a meaning without a table by position describes."""
    queries, keys = torch.arange(rows.start, min(rows.stop, length))[:, None], torch.arange(length)
    distance = queries - keys
    visible = distance >= 0
    if meaning.window is not None:
        visible = visible & (distance < meaning.window)
    if meaning.chunk is not None:
        visible = visible & (queries // meaning.chunk == keys // meaning.chunk)
    bias = torch.zeros(1, *visible.shape)
    if meaning.slopes is not None:
        bias = -meaning.slopes.cpu()[:, None, None] * distance
    if meaning.bias is not None:
        table = meaning.bias.cpu()
        bias = bias + table[:, distance.clamp(0, table.shape[1] - 1)]
    return bias.masked_fill(~visible, -inf)


def recognise(matrix: BiasMatrix) -> MaskMeaning:
    """The narrowest known meaning that reproduces ``matrix``, as far as it reaches; a table needs its limit still."""
    if not matrix.depends_on_distance_only():
        reach = matrix.reach()
        if matrix.is_chunked(reach):
            return MaskMeaning(chunk=reach)
        return MaskMeaning(window=_window(reach, matrix.length), bias=matrix.values)
    by_distance = matrix.values[:, -1].flip(-1)
    visible = by_distance > -inf
    reach = int((visible.any(0) * torch.arange(1, matrix.length + 1, device=visible.device)).max())
    window = _window(reach, matrix.length)
    if bool(visible[:, :reach].all()) and reach:
        near = by_distance[:, :reach]
        if not bool(near.any()):
            return MaskMeaning(window=window)
        slopes = _slopes(near, matrix)
        if slopes is not None:
            return MaskMeaning(window=window, slopes=slopes)
    return MaskMeaning(window=window, bias=by_distance)


def _window(reach: int, length: int) -> int | None:
    """Every key at this distance or more is hidden from every query; None when that is none of the keys."""
    return max(1, reach) if reach < length else None


def _slopes(by_distance: Tensor, matrix: BiasMatrix) -> Tensor | None:
    """Slopes ``[1 | Hq]`` with ``by_distance[h, d] == -slopes[h] * d`` up to float32 rounding, or None.

    A bias computed in bfloat16 or float16 is rounded by far more, and stays as it is: the model was trained with it.
    """
    reach = by_distance.shape[-1]
    if reach < 2:
        return None
    # Slopes are least blurred in the row from which least was subtracted: the first one for slope * k, the last one for
    # slope * (k - (S - 1)).
    first_is_clearer = matrix.shift[:, 1].abs() <= matrix.shift[:, -1].abs()
    slopes = -torch.where(first_is_clearer, matrix.values[:, 1, 0], by_distance[:, -1] / (reach - 1))
    distances = torch.arange(reach, device=by_distance.device, dtype=torch.float32)
    linear = -slopes[:, None] * distances
    if bool(differs(by_distance, linear, matrix.shift[:, -1:], matrix.magnitude).any()):
        return None
    return slopes


def _tabulated(probe: MaskProbe, found: Tensor, max_length: int | None) -> MaskMeaning:
    """The meaning at the length that the table has to cover; ``found`` is the bias at the largest probed length."""
    length = max_length or DEFAULT_TABLE_LENGTH
    if probe.fails_at is not None:
        length = min(length, probe.fails_at - 1)
    _check_size(found, length, probe.longest)
    matrix = probe.extend(length)
    meaning = recognise(matrix)
    if meaning.bias is not None:
        _check_size(meaning.bias, matrix.length, probe.longest)
    # A table shorter than what was probed may look simpler than the mask is: the limit holds all the same.
    return replace(meaning, limit=matrix.length)


def _check_size(bias: Tensor, length: int, longest: int) -> None:
    """Refuse a bias whose evaluation, or whose table, would be too large at ``length``."""
    by_distance = bias.dim() == 2
    most = longest if by_distance else min(longest, isqrt(TABLE_ENTRIES // bias.shape[0]))
    if length > most:
        of = "the distance" if by_distance else "the positions"
        allowed = f"evaluated in {PROBE_ENTRIES >> 18} MiB" if by_distance else f"held in {TABLE_ENTRIES >> 18} MiB"
        raise NotProvenError(
            f"the mask is a bias table over {of} of query and key, and one for {length} tokens cannot be {allowed}: "
            f"pass CacheConfig(max_length={most}) or less"
        )


def _combined(sizes: Iterable[int], window: int | None) -> set[int]:
    """Distances at which a size that showed no effect by itself may act through another one."""
    sizes = [size for size in sizes if size > 1]
    silent = [size for size in sizes if size >= SMALLEST_SIZE and (window is None or abs(size - window) > 1)]
    products = {one * other for one in silent for other in sizes}
    sums = {one + other for one in silent for other in sizes if one != other}
    return {size for size in products | sums if size < ENDLESS}
