import random

import pytest
import torch

from kvpass.runtime.pool.block_table import BlockTable
from kvpass.runtime.schedule.batch import BatchBuilder
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step
from kvpass.runtime.sequences.table_rows import TableRows
from kvpass.types import Sampling


def sequence(tokens, blocks):
    made = Sequence(tokens, 100, Sampling(), seed=0)
    made.tables[0].extend(blocks)
    return made


def test_prefill_chunk_and_decode_are_flattened_in_one_step():
    decoding = sequence([10, 11, 12, 13, 14], [7, 2])
    whole = sequence([20, 21], [5])
    chunk = sequence([30, 31, 32, 33, 34, 35, 36, 37, 38], [1, 8, 3])
    step = Step(((decoding, 4, 5), (whole, 0, 2), (chunk, 3, 6)), (decoding, whole), (0, 0))
    inputs = BatchBuilder(4).build(step)
    assert inputs.token_ids.tolist() == [14, 20, 21, 33, 34, 35]
    assert inputs.positions.tolist() == [4, 0, 1, 3, 4, 5]
    assert inputs.slot_mapping.tolist() == [[2 * 4, 5 * 4, 5 * 4 + 1, 1 * 4 + 3, 8 * 4, 8 * 4 + 1]]
    assert inputs.block_tables.tolist() == [[[7, 2], [5, 0], [1, 8]]]
    assert inputs.seq_lens.tolist() == [5, 2, 6]
    assert inputs.query_start.tolist() == [0, 1, 3, 6]
    assert inputs.logits_index.tolist() == [0, 2]
    assert (inputs.tree_mask, inputs.state_slots, inputs.states) == (None, None, ())
    others = [tensor for name, tensor in vars(inputs).items() if name not in ("tree_mask", "state_slots", "states")]
    assert all(tensor.dtype == torch.int64 for tensor in others)


def test_a_step_with_no_finished_prompt_asks_for_no_logits():
    inputs = BatchBuilder(4).build(Step(((sequence([1, 2, 3], [0]), 0, 2),), (), ()))
    assert inputs.logits_index.tolist() == []
    assert inputs.logits_index.dtype == torch.int64


def test_proposed_tokens_follow_the_newest_one_and_each_has_its_row_of_logits():
    drafting, chunk, plain = sequence([10, 11, 12], [7, 2]), sequence([1, 2, 3, 4, 5], [1, 8]), sequence([20], [5])
    drafting.propose([50, 51, 52])
    ranges = ((drafting, 2, 5), (chunk, 0, 2), (plain, 0, 1))
    inputs = BatchBuilder(4).build(Step(ranges, (drafting, plain), (2, 0)))
    assert inputs.token_ids.tolist() == [12, 50, 51, 1, 2, 20]
    assert inputs.slot_mapping.tolist() == [[7 * 4 + 2, 7 * 4 + 3, 2 * 4, 1 * 4, 1 * 4 + 1, 5 * 4]]
    assert inputs.seq_lens.tolist() == [5, 2, 1]
    assert inputs.logits_index.tolist() == [0, 1, 2, 5]


def naive_tables(sequences, width):
    tables = [table for member in sequences for table in member.tables]
    seen = [table.present(table.num_blocks) if table.num_kept else table.entries for table in tables]
    rows = [[*entries.tolist(), *[0] * width][:width] for entries in seen]
    return [rows[group :: len(sequences[0].tables)] for group in range(len(sequences[0].tables))]


@pytest.mark.parametrize("kept", [0, 2])
def test_tables_that_are_kept_from_step_to_step_are_those_written_anew(kept):
    numbers, rows = random.Random(kept), TableRows()
    known = [sequence([1], []) for _ in range(6)]
    for member in known:
        member.tables = (BlockTable(kept), BlockTable(kept))
    for step in range(300):
        for table in (table for member in known for table in member.tables):
            change = numbers.randrange(8)
            if change == 0 and table.num_blocks > max(table.num_passed, kept):
                table.replace(table.num_blocks - 1, numbers.randrange(1, 99))
            elif change == 1 and numbers.random() < 0.2:
                table.take_end(numbers.randrange(3) if table.num_passed == 0 else 0)
            elif change == 2 and table.num_blocks:
                table.pass_front(numbers.randrange(table.num_blocks))
            elif change < 5:
                table.extend([numbers.randrange(1, 99) for _ in range(numbers.randrange(1, 4))])
        chosen = tuple(numbers.sample(known, numbers.randint(1, 6))) if step % 3 == 0 else tuple(known)
        width = max(1, max(table.num_blocks for member in chosen for table in member.tables))
        assert rows.build(chosen, width).tolist() == naive_tables(chosen, width)


def test_tables_of_an_earlier_step_stay_as_they_were():
    rows, member = TableRows(), sequence([1], [3])
    first = rows.build((member,), 2)
    member.tables[0].extend([4])
    assert rows.build((member,), 2).tolist() == [[[3, 4]]]
    assert first.tolist() == [[[3, 0]]]


def test_an_exception_leaves_no_wrong_row_behind(monkeypatch):
    rows, members = TableRows(), tuple(sequence([1], [block]) for block in range(1, 5))
    rows.build(members, 1)
    write = BlockTable.copy_to
    for failing in range(3):
        calls = iter(range(9))
        for member in members[:3]:
            member.tables[0].replace(0, member.tables[0][0] + 10)

        def fail(table, row, calls=calls, failing=failing):
            if next(calls) == failing:
                raise KeyboardInterrupt
            write(table, row)

        monkeypatch.setattr(BlockTable, "copy_to", fail)
        with pytest.raises(KeyboardInterrupt):
            rows.build(members[::-1], 1)
        monkeypatch.setattr(BlockTable, "copy_to", write)
        assert rows.build(members, 1).tolist() == [[[member.tables[0][0]] for member in members]]
