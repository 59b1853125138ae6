"""Factors of dims: how reshapes, broadcasts and merges keep track of them, and what they must not let pass."""

import pytest
import sympy

from kvpass.fx_passes.token_axis.axes import (
    Axes,
    Dim,
    Factor,
    Kind,
    MixesTokens,
    broadcast,
    check,
    label_by_size,
    merge_dims,
    plain,
    relabel,
    simplified,
    uniform,
)

B, S = sympy.symbols("B S", positive=True, integer=True)
BATCH, TOKEN = (Factor(Kind.BATCH, B),), (Factor(Kind.TOKEN, S),)
LEFT, RIGHT = (Factor(Kind.LEFT, S),), (Factor(Kind.RIGHT, S),)
ONE: Dim = ()


def n(size: int) -> Dim:
    return plain(size)


def head(size: int, tag: int) -> Dim:
    return (Factor(Kind.HEAD, size, tag),)


def anything(size: sympy.Expr) -> Dim:
    return (Factor(Kind.ANY, size),)


def picked(size: sympy.Expr, tag: int) -> Dim:
    return (Factor(Kind.PICKED, size, tag),)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ((BATCH, TOKEN, n(24)), (B, S, 4, 6), (BATCH, TOKEN, n(4), n(6))),
        ((BATCH, TOKEN, n(4), n(6)), (B, S, 24), (BATCH, TOKEN, n(24))),
        ((BATCH, TOKEN, n(24)), (B * S, 24), ((*BATCH, *TOKEN), n(24))),
        (((*BATCH, *TOKEN), n(24)), (B, S, 24), (BATCH, TOKEN, n(24))),
        ((BATCH, n(4), TOKEN, n(6)), (4 * B, S, 6), ((*BATCH, *n(4)), TOKEN, n(6))),
        (((*BATCH, *n(4)), TOKEN, n(6)), (B, 2, 2, S, 6), (BATCH, n(2), n(2), TOKEN, n(6))),
        ((BATCH, TOKEN, n(24)), (B, 1, S, 24, 1), (BATCH, ONE, TOKEN, n(24), ONE)),
        ((BATCH, TOKEN, n(6)), (B, 2 * S, 3), None),
        ((BATCH, TOKEN, n(2), n(3)), (B, 2 * S, 3), (BATCH, (*TOKEN, *n(2)), n(3))),
        ((anything(S), n(3)), (3, S), None),
        ((anything(B), anything(S)), (S, B), (anything(S), anything(B))),
    ],
)
def test_reshapes_keep_the_factors_in_order(axes: Axes, shape: tuple, expected: Axes | None) -> None:
    shape = tuple(sympy.sympify(size) for size in shape)
    if expected is None:
        with pytest.raises(MixesTokens):
            found = relabel(axes, shape)
            assert all(_product(d) == s for d, s in zip(found, shape, strict=True))
            raise MixesTokens("kept whole")  # a reshape that leaves tokens whole may be followed as well
    else:
        assert relabel(axes, shape) == expected


def _product(dim: Dim) -> sympy.Expr:
    return sympy.prod([f.size for f in dim])


@pytest.mark.parametrize(
    ("axes", "shape", "across"),
    [
        ((BATCH, TOKEN, n(6)), (S, B, 6), "batch"),
        ((BATCH, TOKEN, n(6)), (B, S / 2, 12), "token"),
        ((BATCH, n(4), TOKEN, n(6)), (B, S, 24), "plain"),
        ((head(4, 1), LEFT), (2, 2, S), "head"),
        ((TOKEN,), (S, 2), "cannot be followed"),
        ((TOKEN, n(2)), (S,), "cannot be followed"),
    ],
)
def test_reshapes_that_cut_tokens_or_reorder_them_raise(axes: Axes, shape: tuple, across: str) -> None:
    with pytest.raises(MixesTokens, match=across):
        relabel(axes, tuple(sympy.sympify(size) for size in shape))


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ([ONE, ONE], ONE),
        ([ONE, TOKEN], TOKEN),
        ([TOKEN, ONE, TOKEN], TOKEN),
        ([anything(S), TOKEN], TOKEN),
        ([TOKEN, anything(S)], TOKEN),
        ([anything(S), RIGHT, ONE], RIGHT),
        ([n(4), head(4, 1)], head(4, 1)),
        ([head(4, 2), n(4)], head(4, 2)),
        ([head(4, 1), head(4, 2)], head(4, 1)),
        ([n(8), (*head(4, 1), *n(2))], (*head(4, 1), *n(2))),
        ([LEFT, TOKEN], LEFT),  # a number for each token, beside scores
        ([TOKEN, RIGHT], RIGHT),
    ],
)
def test_merged_dims_take_the_stronger_meaning(dims: list[Dim], expected: Dim) -> None:
    assert merge_dims(dims) == expected


@pytest.mark.parametrize(
    "dims",
    [
        [TOKEN, BATCH],
        [TOKEN, n(4)],
        [TOKEN, plain(S)],
        [LEFT, RIGHT],
        [plain(4), LEFT],
        [(*BATCH, *TOKEN), LEFT],
        [head(4, 1), n(2)],
        [(*BATCH, *TOKEN), (*TOKEN, *BATCH)],
        [picked(S, 1), picked(S, 2)],
        [picked(S, 1), TOKEN],
    ],
)
def test_dims_that_count_different_things_do_not_merge(dims: list[Dim]) -> None:
    for order in (dims, dims[::-1]):
        with pytest.raises(MixesTokens, match="lines up"):
            merge_dims(order)


@pytest.mark.parametrize(
    ("operands", "rank", "expected"),
    [
        ([(BATCH, TOKEN, n(6)), (n(6),)], 3, (BATCH, TOKEN, n(6))),
        ([(BATCH, TOKEN, n(6)), (TOKEN, ONE)], 3, (BATCH, TOKEN, n(6))),
        ([(TOKEN, ONE), (n(6),)], 2, (TOKEN, n(6))),
        ([(ONE, TOKEN), (BATCH, ONE)], 2, (BATCH, TOKEN)),
        ([(BATCH, TOKEN, n(6)), ()], 3, (BATCH, TOKEN, n(6))),
    ],
)
def test_broadcasts_line_up_at_the_last_dim(operands: list[Axes], rank: int, expected: Axes) -> None:
    assert broadcast(operands, rank) == expected


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ([(TOKEN, ONE), (ONE, TOKEN)], "tokens with tokens"),
        ([(BATCH, ONE, TOKEN), (BATCH, ONE)], "sequences with sequences"),
        ([(TOKEN,), (BATCH, ONE, n(3))], "lines up"),
        ([(picked(S, 1), ONE), (ONE, TOKEN)], "picked tokens with all tokens"),
    ],
)
def test_broadcasts_of_tokens_with_tokens_raise(operands: list[Axes], reason: str) -> None:
    with pytest.raises(MixesTokens, match=reason):
        broadcast(operands, max(map(len, operands)))


def test_check_allows_each_kind_once_and_scores_of_both() -> None:
    assert check((BATCH, head(2, 1), head(3, 2), LEFT, RIGHT)) == (BATCH, head(2, 1), head(3, 2), LEFT, RIGHT)
    for twice in (BATCH, TOKEN, LEFT, RIGHT):
        with pytest.raises(MixesTokens):
            check((twice, n(3), twice))


def test_ones_vanish_and_plain_neighbours_join() -> None:
    two, three, tokens = Factor(Kind.PLAIN, sympy.Integer(2)), Factor(Kind.PLAIN, sympy.Integer(3)), TOKEN[0]
    assert simplified([two, Factor(Kind.PLAIN, sympy.Integer(1)), three]) == n(6)
    assert simplified([two, tokens, three]) == (two, tokens, three)
    assert plain(1) == ONE


def test_labels_by_size_and_of_what_is_the_same_everywhere() -> None:
    assert label_by_size((B, S, sympy.Integer(4), B * S), B, S) == (BATCH, TOKEN, n(4), anything(B * S))
    assert uniform((S, sympy.Integer(4), sympy.Integer(1))) == (anything(S), n(4), ONE)
