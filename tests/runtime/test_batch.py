import torch

from kvpass.runtime.batch import build_step_inputs
from kvpass.runtime.sequence import Sequence
from kvpass.runtime.step import Step, TokenRange
from kvpass.types import Sampling


def sequence(tokens, blocks):
    made = Sequence(tokens, 100, Sampling(), seed=0)
    made.tables[0].extend(blocks)
    return made


def test_prefill_chunk_and_decode_are_flattened_in_one_step():
    decoding = sequence([10, 11, 12, 13, 14], [7, 2])
    whole = sequence([20, 21], [5])
    chunk = sequence([30, 31, 32, 33, 34, 35, 36, 37, 38], [1, 8, 3])
    step = Step(
        (TokenRange(decoding, 4, 5), TokenRange(whole, 0, 2), TokenRange(chunk, 3, 6)), (decoding, whole), (0, 0)
    )
    inputs = build_step_inputs(step, block_size=4)
    assert inputs.token_ids.tolist() == [14, 20, 21, 33, 34, 35]
    assert inputs.positions.tolist() == [4, 0, 1, 3, 4, 5]
    assert inputs.slot_mapping.tolist() == [[2 * 4, 5 * 4, 5 * 4 + 1, 1 * 4 + 3, 8 * 4, 8 * 4 + 1]]
    assert inputs.block_tables.tolist() == [[[7, 2], [5, 0], [1, 8]]]
    assert inputs.seq_lens.tolist() == [5, 2, 6]
    assert inputs.query_start.tolist() == [0, 1, 3, 6]
    assert inputs.logits_index.tolist() == [0, 2]
    assert all(tensor.dtype == torch.int64 for tensor in vars(inputs).values())


def test_a_step_with_no_finished_prompt_asks_for_no_logits():
    inputs = build_step_inputs(Step((TokenRange(sequence([1, 2, 3], [0]), 0, 2),), (), ()), block_size=4)
    assert inputs.logits_index.tolist() == []
    assert inputs.logits_index.dtype == torch.int64


def test_proposed_tokens_follow_the_newest_one_and_each_has_its_row_of_logits():
    drafting, chunk, plain = sequence([10, 11, 12], [7, 2]), sequence([1, 2, 3, 4, 5], [1, 8]), sequence([20], [5])
    drafting.propose([50, 51, 52])
    ranges = (TokenRange(drafting, 2, 5), TokenRange(chunk, 0, 2), TokenRange(plain, 0, 1))
    inputs = build_step_inputs(Step(ranges, (drafting, plain), (2, 0)), block_size=4)
    assert inputs.token_ids.tolist() == [12, 50, 51, 1, 2, 20]
    assert inputs.slot_mapping.tolist() == [[7 * 4 + 2, 7 * 4 + 3, 2 * 4, 1 * 4, 1 * 4 + 1, 5 * 4]]
    assert inputs.seq_lens.tolist() == [5, 2, 1]
    assert inputs.logits_index.tolist() == [0, 1, 2, 5]
