"""A step of the scheduler as the tensors that a paged module takes."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.runtime.sequences.draft_tree import DraftTree
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step, TokenRange
from kvpass.runtime.sequences.table_rows import TableRows
from kvpass.types import StepInputs


class BatchBuilder:
    """Flattens one step after the other; what block tables have in common with the step before is not built again."""

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self._block_size = block_size
        self._device = device
        self._rows = TableRows()

    def build(self, step: Step, states: tuple[Tensor, ...] = (), scored: Ordered[TokenRange] = ()) -> StepInputs:
        """Flatten a step that is not empty: T tokens of N sequences, oldest sequence first, with their ``states``.

        Returns:
            StepInputs on the device; ``logits_index`` has ``1 + drafted`` rows for each of ``step.sampled``, in that
            order, then those of the tokens ``scored``. Later steps leave them as they are.
        """
        size = self._block_size
        sequences: tuple[Sequence, ...]
        sequences, first, last = zip(*step.ranges, strict=True)
        starts, ends = np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)
        known = np.array([sequence.num_tokens for sequence in sequences], dtype=np.int64)
        counts = ends - starts
        query_start = np.concatenate(([0], counts.cumsum()))
        tables = self._rows.build(sequences, -(-int(ends.max()) // size))
        # Tokens whose blocks were given back leave no gap: those that are left come one after the other, in order.
        gone = _forgotten_blocks(sequences) * size
        trees: dict[int, DraftTree] = {}
        if query_start[-1] == len(sequences) and (ends == known).all():  # one token of each sequence, its newest
            tokens = np.array([sequence.newest for sequence in sequences], dtype=np.int64)
            rows, positions = np.arange(len(sequences)), starts
        else:
            parts = [sequence.tokens_to_compute(start, end) for sequence, start, end in step.ranges]
            tokens = np.concatenate(parts).astype(np.int64)
            rows = np.repeat(np.arange(len(sequences)), counts)
            positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[rows]
            trees = _trees_of(step)
        places = positions - gone[rows]
        slots = tables[:, rows, places // size] * size + places % size
        for row, tree in trees.items():
            positions[query_start[row + 1] - len(tree.tokens) : query_start[row + 1]] = known[row] - 1 + tree.depths()
        sampled = _rows_with_logits(step, query_start[1:], ends - known)
        return StepInputs(
            token_ids=self._move(tokens),
            positions=self._move(positions),
            slot_mapping=self._move(slots),
            block_tables=self._move(tables),
            seq_lens=self._move(ends - gone),
            query_start=self._move(query_start),
            logits_index=self._move(np.concatenate((sampled, *_rows_of(scored, step, query_start)))),
            tree_mask=torch.from_numpy(_tree_mask(query_start, trees)).to(self._device) if trees else None,
            state_slots=self._move(np.array([s.state_slot for s in sequences], dtype=np.int64)) if states else None,
            states=states,
        )

    def _move(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _rows_of(scored: Ordered[TokenRange], step: Step, query_start: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of some tokens of a step."""
    if not scored:
        return []
    first = {sequence: int(row) - start for (sequence, start, _), row in zip(step.ranges, query_start, strict=False)}
    return [np.arange(first[sequence] + start, first[sequence] + end) for sequence, start, end in scored]


def _forgotten_blocks(sequences: tuple[Sequence, ...]) -> NDArray[np.int64]:
    """``[N]``: entries of each block table that the kernels must not see."""
    if not sequences[0].tables[0].num_kept:  # the same for all: none forgets anything
        return np.zeros(len(sequences), dtype=np.int64)
    return np.array([sequence.tables[0].num_forgotten for sequence in sequences], dtype=np.int64)


def _trees_of(step: Step) -> dict[int, DraftTree]:
    """The proposed tokens that are no chain, by the place of their sequence in the step."""
    trees = {}
    for row, (sequence, _, end) in enumerate(step.ranges):
        if sequence.draft_parents is not None and end > sequence.num_tokens:
            tree = sequence.draft_tree(end - sequence.num_tokens)
            if not tree.is_chain:
                trees[row] = tree
    return trees


def _tree_mask(query_start: NDArray[np.int64], trees: dict[int, DraftTree]) -> NDArray[np.bool_]:
    """``[T, M]``: which of its sequence's tokens of the step each token sees, see :class:`~kvpass.types.StepInputs`."""
    counts = np.diff(query_start)
    mask = np.zeros((query_start[-1], counts.max()), dtype=bool)
    for row, (start, count) in enumerate(zip(query_start[:-1], counts, strict=True)):
        mask[start : start + count, :count] = np.tri(count, dtype=bool)
        if row in trees:
            visible = trees[row].visible()
            mask[start + count - len(visible) : start + count, count - len(visible) : count] = visible
    return mask


def _rows_with_logits(step: Step, row_ends: NDArray[np.int64], beyond: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the newest token of each sampled sequence, or of the one that it follows, and of those proposed after it.

    Args:
        step: what is computed.
        row_ends: ``[N]``, where the rows of each sequence end.
        beyond: ``[N]``, how many tokens the range of each goes past its newest one; negative where it ends before.
    """
    reached = beyond >= 0
    last, drafted = row_ends[reached] - 1, beyond[reached]
    if len(step.sampled) > len(last):
        followed = np.cumsum([sequence.leader is None for sequence in step.sampled]) - 1
        last, drafted = (last - drafted)[followed], np.array(step.drafted)
        last = last + drafted
    if not drafted.any():
        return last
    ends = np.cumsum(drafted + 1)
    return np.arange(ends[-1]) + np.repeat(last + 1 - ends, drafted + 1)
