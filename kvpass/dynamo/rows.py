"""The rows of a batch as they are without padding, and logits put back to where their tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.engine.padded_rows import check_positions, present_tokens
from kvpass.engine.row_session import Row
from kvpass.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Rows of a call.

    Attributes:
        rows: the tokens of each, without padding.
        starts: where the first token of each stands.
        length: of the padded rows.
    """

    rows: list[Row]
    starts: list[int]
    length: int

    @property
    def is_padded(self) -> bool:
        """Whether any row is shorter than the batch."""
        return any(len(row) < self.length for row in self.rows)

    @property
    def is_padded_behind(self) -> bool:
        """Whether the last token of any row is followed by padding."""
        return any(start + len(row) < self.length for row, start in zip(self.rows, self.starts, strict=True))

    @property
    def sides(self) -> set[tuple[bool, bool]]:
        """Of the padded rows, whether there is padding before the text, and behind it."""
        found = {(start > 0, start + len(row) < self.length) for row, start in zip(self.rows, self.starts, strict=True)}
        return found - {(False, False)}

    def place(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, S, V]`` with those of each row, ``[len(row), V]``, in their places; zero at padding."""
        if not self.is_padded:
            return torch.stack(list(logits))
        placed = logits[0].new_zeros(len(self.rows), self.length, logits[0].shape[-1])
        for out, start, part in zip(placed, self.starts, logits, strict=True):
            out[start : start + len(part)] = part
        return placed


def read_batch(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None = None, before: Sequence[int] | None = None
) -> Batch:
    """The rows of token ids ``[B, S]``.

    Args:
        ids: token ids.
        mask: ones, and zeros at padding, of the same shape or ``[1, S]``; None where nothing is padded.
        positions: of each token; likewise, None where they follow from the rest.
        before: tokens that each row goes on from; None for none.

    Raises:
        InputError: if a row is padding alone or has a gap, or the positions do not count its tokens.
    """
    if mask is None and positions is None:
        return Batch([tuple(row) for row in ids.tolist()], [0] * len(ids), ids.shape[1])
    present = present_tokens(ids, mask)
    rows, starts = [], []
    for row, here in zip(ids.tolist(), present.tolist(), strict=True):
        if not any(here):
            raise InputError("a row of the batch is padding and nothing else: leave it out")
        first = here.index(True)
        count = sum(here)
        if not all(here[first : first + count]):
            raise InputError("a row has padding between its tokens: pad it on one side")
        rows.append(tuple(row[first : first + count]))
        starts.append(first)
    batch = Batch(rows, starts, ids.shape[1])
    if positions is not None:
        check_positions(positions, present, before)
    return batch
