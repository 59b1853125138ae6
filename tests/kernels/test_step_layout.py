"""Layouts stay within their budgets, touch only what is seen, and refuse steps that do not fit together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.step_layout import DecodeChunk, StepLayout, Tiling, lay_out_step


def lay_out(
    lengths: list[int], counts: list[int], *, window: int | None = None, slabs: int = 64, scores: int = 1 << 20
) -> tuple[Tensor, StepLayout]:
    """Block tables that count from 0, and the layout for 2 KV heads of 3 query heads each, 4 tokens per block."""
    width = max(-(-length // 4) for length in lengths)
    tables = torch.arange(len(lengths) * width).view(len(lengths), width)
    starts = torch.tensor([0, *counts]).cumsum(0)
    tiling = Tiling(4, 2, 3, window, slabs, scores)
    return tables, lay_out_step(tables, torch.tensor(lengths), starts, tiling)


def padded(chunk: DecodeChunk) -> int:
    """Slabs that a chunk gathers."""
    return sum(len(part.slabs) for part in chunk.parts)


def test_every_row_is_in_one_chunk() -> None:
    _, layout = lay_out([50, 3, 17, 41, 3, 8, 100], [1, 1, 0, 1, 1, 1, 1], slabs=12)
    rows = torch.cat([chunk.rows for chunk in layout.decode if chunk.rows is not None])
    assert rows.sort().values.tolist() == list(range(12))
    heads = torch.cat([chunk.heads for chunk in layout.decode])
    assert torch.equal(heads, rows % 2)


def test_a_chunk_gathers_no_more_than_its_budget() -> None:
    _, layout = lay_out([50, 3, 17, 41, 3, 8, 100], [1] * 7, slabs=12)
    assert all(len(part.slabs) <= 12 for chunk in layout.decode for part in chunk.parts)
    assert all(len(chunk.parts) == 1 for chunk in layout.decode if len(chunk.heads) > 1)


def test_one_long_sequence_does_not_pad_the_others() -> None:
    lengths = [4000] + [8] * 300
    _, layout = lay_out(lengths, [1] * 301, slabs=64)
    needed = 2 * sum(-(-length // 4) for length in lengths)
    assert sum(padded(chunk) for chunk in layout.decode) == needed


def test_a_small_step_is_one_chunk_of_all_rows() -> None:
    _, layout = lay_out([9, 4, 7], [1, 1, 1])
    (chunk,) = layout.decode
    assert chunk.rows is None
    assert len(chunk.parts) == 1


def test_equal_lengths_need_no_mask() -> None:
    _, layout = lay_out([9, 9], [1, 1])
    (chunk,) = layout.decode
    assert chunk.sight.hidden is None
    assert chunk.parts[0].unseen is None


@pytest.mark.parametrize("counts", [[1, 1], [3, 2]])
def test_only_blocks_that_the_window_touches_are_gathered(counts: list[int]) -> None:
    tables, layout = lay_out([83, 60], counts, window=5)
    touched = set(tables[0, (83 - counts[0] - 4) // 4 :].tolist()) | set(
        tables[1, (60 - counts[1] - 4) // 4 : 15].tolist()
    )
    slabs = [part.slabs for chunk in layout.decode for part in chunk.parts] + [run.slabs for run in layout.prefill]
    assert set((torch.cat(slabs) // 2).tolist()) == touched


@pytest.mark.parametrize("window", [None, 7])
def test_pieces_cover_the_new_tokens_and_keep_the_scores_bounded(window: int | None) -> None:
    _, layout = lay_out([90, 33], [40, 33], window=window, slabs=16, scores=1500)
    for run in layout.prefill:
        for piece in run.pieces:
            queries, keys = piece.tokens.stop - piece.tokens.start, piece.keys.stop - piece.keys.start
            assert queries * keys * 3 * (run.heads.stop - run.heads.start) <= 1500
            assert piece.sight.query.numel() == queries
            assert piece.sight.key.numel() == keys
    tokens = [t for run in layout.prefill if run.heads.start == 0 for p in run.pieces for t in range(73)[p.tokens]]
    assert tokens == list(range(73))


def test_a_sequence_without_new_tokens_takes_no_part() -> None:
    _, layout = lay_out([500, 9], [0, 1])
    assert layout.longest == 9
    assert layout.tokens == 1
    assert [padded(chunk) for chunk in layout.decode] == [6]


@pytest.mark.parametrize(
    ("lens", "starts", "message"),
    [
        ([3, 5], [0, 1], r"does not hold the first row of each of 2 sequences"),
        ([3, 5], [1, 2, 3], r"does not hold the first row of each of 2 sequences"),
        ([3, 5], [0, 4, 5], r"sequence 0 has 4 new tokens, a length of 3"),
        ([3, 5], [0, 2, 1], r"sequence 1 has -1 new tokens"),
        ([3, 9], [0, 1, 2], r"sequence 1 has 1 new tokens, a length of 9 and blocks for 8 tokens"),
    ],
)
def test_a_step_that_does_not_fit_together_is_an_error(lens: list[int], starts: list[int], message: str) -> None:
    tables = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        lay_out_step(tables, torch.tensor(lens), torch.tensor(starts), Tiling(4, 2, 3, None, 64, 64))
