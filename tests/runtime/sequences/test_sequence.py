from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.types import Sampling


def make(prompt=(5, 6, 7), max_new_tokens=3, stop_ids=()):
    return Sequence(list(prompt), max_new_tokens, Sampling(), seed=0, stop_ids=stop_ids)


def test_tokens_grow_past_the_first_capacity():
    sequence = make(max_new_tokens=1000)
    for token in range(999):
        sequence.append(token)
    assert sequence.output == list(range(999))
    assert sequence.tokens.tolist() == [5, 6, 7, *range(999)]
    assert (sequence.num_tokens, sequence.num_output) == (1002, 999)
    assert sequence.state is SequenceState.NEW


def test_the_length_ends_a_sequence():
    sequence = make()
    for token in (1, 2, 3):
        assert sequence.finish_reason is None
        sequence.append(token)
    assert (sequence.state, sequence.finish_reason) == (SequenceState.FINISHED, "length")


def test_a_stop_token_is_the_last_one_kept():
    sequence = make(stop_ids=(9,))
    sequence.append(1)
    sequence.append(9)
    assert (sequence.output, sequence.finish_reason) == ([1, 9], "stop")


def test_a_stop_token_in_the_prompt_ends_nothing():
    assert make(prompt=(9,), stop_ids=(9,)).state is SequenceState.NEW


def test_the_last_new_token_needs_no_slot():
    assert make(max_new_tokens=1).max_cached_tokens == 3
    assert make(max_new_tokens=4).max_cached_tokens == 6


def test_the_table_grows_changes_and_empties():
    sequence = make()
    (table,) = sequence.tables
    table.extend([4])
    table.extend(list(range(10, 60)))
    assert table.entries.tolist() == [4, *range(10, 60)]
    assert table.replace(1, 3) == 10
    sequence.num_computed = 2
    assert sequence.take_blocks() == [4, 3, *range(11, 60)]
    assert (table.num_blocks, sequence.num_computed, len(table.entries)) == (0, 0, 0)
