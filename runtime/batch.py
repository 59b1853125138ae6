"""A step of the scheduler as the tensors that a paged module takes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.runtime.step import Step
from kvpass.types import StepInputs


def build_step_inputs(step: Step, block_size: int, device: torch.device | str = "cpu") -> StepInputs:
    """Flatten a step that is not empty: T tokens of N sequences, oldest sequence first.

    Returns:
        StepInputs on ``device``; ``logits_index`` has ``1 + drafted`` rows for each of ``step.sampled``, in that order.
    """
    starts = np.array([start for _, start, _ in step.ranges], dtype=np.int64)
    ends = np.array([end for _, _, end in step.ranges], dtype=np.int64)
    known = np.array([sequence.num_tokens for sequence, _, _ in step.ranges], dtype=np.int64)
    counts = ends - starts
    query_start = np.concatenate(([0], np.cumsum(counts)))
    # Tokens whose blocks were given back leave no gap: those that are left come one after the other, in order.
    gone = np.array([sequence.tables[0].num_forgotten for sequence, _, _ in step.ranges], dtype=np.int64) * block_size
    tables = _block_tables(step, (-(-ends // block_size)).tolist())
    if query_start[-1] == len(starts) and (ends == known).all():  # one token of each sequence, its newest
        tokens = np.array([sequence.newest for sequence, _, _ in step.ranges], dtype=np.int64)
    else:
        parts = [sequence.tokens_to_compute(start, end) for sequence, start, end in step.ranges]
        tokens = np.concatenate(parts).astype(np.int64)
    rows = np.repeat(np.arange(len(starts)), counts)
    positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[rows]
    places = positions - gone[rows]
    slots = tables[:, rows, places // block_size] * block_size + places % block_size

    def move(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return StepInputs(
        token_ids=move(tokens),
        positions=move(positions),
        slot_mapping=move(slots),
        block_tables=move(tables),
        seq_lens=move(ends - gone),
        query_start=move(query_start),
        logits_index=move(_rows_with_logits(query_start[1:], ends - known)),
    )


def _rows_with_logits(row_ends: NDArray[np.int64], beyond: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the newest token of each sequence and of those proposed after it.

    Args:
        row_ends: ``[N]``, where the rows of each sequence end.
        beyond: ``[N]``, how many tokens the range of each goes past its newest one; negative where it ends before.
    """
    reached = beyond >= 0
    last, drafted = row_ends[reached] - 1, beyond[reached]
    if not drafted.any():
        return last
    ends = np.cumsum(drafted + 1)
    return np.arange(ends[-1]) + np.repeat(last + 1 - ends, drafted + 1)


def _block_tables(step: Step, widths: list[int]) -> NDArray[np.int64]:
    """``[G, N, W]``: the first ``widths`` blocks of each sequence in each group, but those forgotten, then zeros."""
    groups = len(step.ranges[0].sequence.tables)
    tables = np.zeros((groups, len(widths), max(widths)), dtype=np.int64)
    for group, rows in enumerate(tables):
        for row, (sequence, _, _), width in zip(rows, step.ranges, widths, strict=True):
            sequence.tables[group].copy_to(row, width)
    return tables
