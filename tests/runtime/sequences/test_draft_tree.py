"""Trees of drafts: how they are made, what is accepted of them, and where its rows go."""

import numpy as np
import pytest
import torch

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.row_moves import move_rows
from kvpass.runtime.schedule.batch import BatchBuilder
from kvpass.runtime.sequences.draft_tree import DraftTree, chain, merge_paths
from kvpass.runtime.speculation.accepted_rows import rows_to_move
from kvpass.runtime.speculation.prompt_lookup import PromptLookup
from kvpass.runtime.speculation.verification import choose_tokens
from kvpass.types import Sampling
from tests.runtime.speculation.test_speculation import chi_squared, sequence_of, step_of

TREE = DraftTree([5, 6, 7, 8, 6], [-1, 0, -1, 2, 2])  # 5-6, 7-8, 7-6


def test_paths_become_a_tree_with_what_they_share_once():
    tree = merge_paths([[1, 2, 3], [1, 2, 4], [5], [1, 6], [1, 2]])
    assert tree == DraftTree([1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, -1, 0])
    assert tree.depths() == [1, 2, 3, 3, 1, 2] and tree.is_valid and not tree.is_chain
    assert tree.cut(3) == chain([1, 2, 3]) and tree.cut(3).is_chain
    assert merge_paths([]) == chain([]) == merge_paths([[]])
    assert tree.follow([1, 2, 4, 9]) == [0, 1, 3] and tree.follow([2]) == [] and tree.follow([5, 5]) == [4]
    seen = [[place for place in range(6) if row[place]] for row in tree.visible()]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [0, 5]]


def test_lookup_proposes_what_followed_other_occurrences_too():
    # [1, 2] was followed by 3, by 4 (twice) and by 5; 2 alone by 8 as well.
    text = [1, 2, 3, 0, 1, 2, 4, 1, 2, 5, 9, 2, 8, 1, 2, 4, 6, 1, 2]
    for branches, expected in (
        (1, [4, 6]),
        (2, DraftTree([4, 6, 5, 9], [-1, 0, -1, 2])),
        (4, DraftTree([4, 6, 5, 9, 3, 0, 8, 1], [-1, 0, -1, 2, -1, 4, -1, 6])),
    ):
        drafter = PromptLookup((2, 1), max_draft=2, branches=branches)
        assert drafter.propose([sequence_of(text)], [5]) == [expected]
    assert drafter.propose([sequence_of([1, 2, 3])], [5]) == [[]]


def test_a_step_with_a_tree_has_positions_by_depth_slots_by_place_and_the_ancestors():
    drafted, plain = sequence_of([1, 2, 3]), sequence_of([4, 5])
    drafted.propose(*TREE)
    for sequence, blocks in ((drafted, [9, 4]), (plain, [2])):
        sequence.tables[0].extend(blocks)
    inputs = BatchBuilder(4).build(step_of(drafted, plain))
    assert inputs.token_ids.tolist() == [3, *TREE.tokens, 5]
    assert inputs.positions.tolist() == [2, 3, 4, 3, 4, 4, 1]
    assert inputs.slot_mapping.tolist() == [[38, 39, 16, 17, 18, 19, 9]]
    assert inputs.seq_lens.tolist() == [8, 2] and inputs.logits_index.tolist() == list(range(7))
    shown = [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0]]
    assert [row.nonzero().flatten().tolist() for row in inputs.tree_mask] == shown
    drafted.propose([5, 6], [-1, 0])
    assert BatchBuilder(4).build(step_of(drafted, plain)).tree_mask is None


@pytest.mark.parametrize(
    ("best", "expected", "moves"),
    [
        ([7, 1, 1, 6, 1, 2], [7, 6, 2], [(2, 0), (4, 1)]),
        ([5, 6, 3, 1, 1, 1], [5, 6, 3], []),
        ([5, 8, 1, 1, 1, 1], [5, 8], []),
        ([7, 1, 1, 8, 9, 1], [7, 8, 9], [(2, 0), (3, 1)]),
        ([6, 1, 1, 1, 1, 1], [6], []),
    ],
)
def test_the_path_of_the_chosen_tokens_is_accepted_and_moved(best, expected, moves):
    sequence = sequence_of([1, 2, 3])
    sequence.propose(*TREE)
    sequence.tables[0].extend([9, 4])
    step = step_of(sequence)
    logits = torch.nn.functional.one_hot(torch.tensor(best), 10).float()
    tokens = choose_tokens(logits, step)
    assert tokens == [expected]
    found = rows_to_move(step, tokens, 4)
    slots = [39, 16, 17, 18, 19]
    if moves:
        assert found[:, 0].T.tolist() == [[slots[a], slots[b]] for a, b in moves]
    else:
        assert found is None
    # Cut behind the third node, the tree has no path to the others.
    short = type(step)(((sequence, 2, 6),), (sequence,), (3,))
    assert choose_tokens(logits[:4], short)[0] == expected[: 2 if expected[0] == 7 else 3]


@pytest.mark.parametrize("drafted", ["likeliest", "unlikely", "drawn"])
def test_the_distribution_of_sampled_tokens_is_that_of_plain_decoding(drafted):
    """Pairs of tokens from 6,000 seeds and trees of two times two, against chances computed by hand in float64."""
    draws, size = 6_000, 5
    table = torch.tensor(np.random.default_rng(6).normal(size=(size, size)) * 1.5, dtype=torch.float32)
    chances = torch.softmax(table.double() / 0.8, -1).numpy()
    numbers = np.random.default_rng(2)

    def children(token):
        if drafted == "drawn":
            return numbers.choice(size, size=2, replace=False).tolist()
        order = np.argsort(chances[token]).tolist()
        return order[:2] if drafted == "unlikely" else order[-2:]

    sequences = [sequence_of([0], 9, Sampling(temperature=0.8), seed) for seed in range(draws)]
    for sequence in sequences:
        sequence.propose(*merge_paths([[a, b] for a in children(0) for b in children(a)]))
        assert sequence.num_draft == 6
    rows = torch.tensor([[0, *sequence.draft] for sequence in sequences]).flatten()
    new = choose_tokens(table[rows], step_of(*sequences))
    limits = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}  # the 99.9 % points of chi-squared
    statistic, cells = chi_squared(np.bincount([tokens[0] for tokens in new], minlength=size), chances[0])
    assert cells == size and statistic < limits[4]
    compared = 0
    for first in range(size):
        seconds = [tokens[1] for tokens in new if tokens[0] == first and len(tokens) > 1]
        if len(seconds) > 100:
            statistic, cells = chi_squared(np.bincount(seconds, minlength=size), chances[first])
            assert statistic < limits[max(1, cells - 1)]
            compared += 1
    assert compared
    # One of two children is accepted as often as both together are chosen: the first ones, and those behind them.
    for depth in (0, 1):
        reached = [(s, tokens) for s, tokens in zip(sequences, new, strict=True) if len(tokens) > depth]
        taken = np.array([len(tokens) > depth + 1 for _, tokens in reached])
        hoped = np.array([chance_of_children(chances, s.draft_tree(6), tokens[:depth]) for s, tokens in reached])
        assert abs(taken.mean() - hoped.mean()) < 4 * (hoped * (1 - hoped)).sum() ** 0.5 / len(hoped)


def chance_of_children(chances, tree, path):
    """How likely the token after ``path`` is one that is proposed there."""
    node = (tree.follow(path) or [-1])[-1]
    proposed = [token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent == node]
    return chances[path[-1] if path else 0][proposed].sum()


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.settles is None])
def test_rows_are_moved_bit_by_bit(name):
    form = FORMATS[name]
    cache = form.allocate(3, 2, 4, 8, "cpu")
    bits = cache.view(torch.uint8)
    bits.copy_(torch.randint(0, 255, bits.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    before = bits.clone()
    # Two rows are exchanged, a third goes to where one of them... was not.
    move_rows(cache, name, torch.tensor([9, 2, 6]), torch.tensor([2, 9, 0]))
    row = form.stored_width(8) * cache.dtype.itemsize
    tail = 4 if form.scaled else 0

    def rows_of(bits):
        """Bytes of each slot and head, by hand: codes first, behind them the scales of the slab."""
        slabs = bits.reshape(3, 2, -1)
        codes = slabs[:, :, : 4 * (row - tail)].reshape(3, 2, 4, row - tail)
        scales = slabs[:, :, 4 * (row - tail) :].reshape(3, 2, 4, tail)
        return torch.cat((codes, scales), 3).transpose(1, 2).reshape(12, 2, row)

    expected = rows_of(before)[[6, 1, 9, 3, 4, 5, 6, 7, 8, 2, 10, 11]]
    assert torch.equal(rows_of(bits), expected)
    nothing = form.allocate(3, 2, 4, 0, "cpu")
    move_rows(nothing, name, torch.tensor([9]), torch.tensor([2]))


def test_rows_of_blocks_that_are_stored_as_a_whole_cannot_be_moved():
    with pytest.raises(InputError, match="rows of the format k4 cannot be moved"):
        move_rows(FORMATS["k4"].allocate(1, 1, 16, 16, "cpu"), "k4", torch.tensor([1]), torch.tensor([0]))
