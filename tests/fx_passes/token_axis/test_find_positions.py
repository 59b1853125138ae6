"""What counts positions is found, computes the right values at any position, and nothing else is taken for it."""

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from kvpass.config import CacheConfig
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph, is_call
from kvpass.fx_passes.planning.plan_cache import table_limit
from kvpass.fx_passes.shape_values import ShapeEvaluator, classify
from kvpass.fx_passes.token_axis.axes import Mixed
from kvpass.fx_passes.token_axis.find_positions import (
    NO_SOURCE,
    SOURCE,
    Counting,
    Lookup,
    Tabulated,
    largest,
)
from kvpass.fx_passes.token_axis.infer_axes import Inference
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes
from tests.fx_passes.tracing import Cases, captured, outputs, show


def s(x: Tensor) -> int:
    return x.size(1)


def column(values: Tensor) -> Tensor:
    return values.to(torch.float64)[:, None]


def distances(x: Tensor) -> Tensor:
    i = torch.arange(s(x))
    return i[:, None] - i


# Functions of the position alone, `[S, 1 | 6]`, and the kind of source that they come from.
POSITIONS = {
    "arange": (lambda m, x: column(torch.arange(s(x))), Counting(0, 1)),
    "arange with a start": (lambda m, x: column(torch.arange(2, s(x) + 2)), Counting(2, 1)),
    "float arange": (lambda m, x: column(torch.arange(s(x), dtype=torch.float32)), Counting(0, 1)),
    "half a step on": (lambda m, x: column(torch.arange(s(x)) + 0.5), Counting(0, 1)),
    "arange with a step": (lambda m, x: column(torch.arange(0, 2 * s(x), 2)), None),
    "arange of a slice": (lambda m, x: column(torch.arange(64)[: s(x)]), Lookup),
    "rows of a table": (lambda m, x: m.table[: s(x)], Lookup),
    "rows of a table with an offset": (lambda m, x: m.table[2 : s(x) + 2], Lookup),
    "a row for four positions": (lambda m, x: m.table[torch.arange(s(x)) // 4], Counting(0, 1)),
    "a row from before": (lambda m, x: m.table[torch.arange(s(x)) - 5], Counting(0, 1)),
    "columns of a table": (lambda m, x: m.table.t()[:, : s(x)].t(), Lookup),
    "cumsum of ones": (lambda m, x: column(torch.ones(s(x)).cumsum(0)), Counting(1, 1)),
    "cumsum of a full mask, less one": (
        lambda m, x: column(torch.ones_like(x[..., 0], dtype=torch.int64).cumsum(-1)[0] - 1),
        None,
    ),
    "decay by cumprod": (lambda m, x: column(torch.full((s(x),), 0.9, dtype=torch.float64).cumprod(0)), Tabulated),
    "cumsum that stops at 20": (lambda m, x: column((torch.arange(s(x)) < 20).cumsum(0)), Tabulated),
    "cumsum that no probe sees stop": (lambda m, x: column((torch.arange(s(x)) < 20000).cumsum(0)), Tabulated),
    "number of visible keys": (lambda m, x: column(distances(x).ge(0).sum(-1)), Counting(1, 1)),
    "number of keys in a window that no probe reaches": (
        lambda m, x: column(((distances(x) >= 0) & (distances(x) < 20000)).sum(-1)),
        Tabulated,
    ),
    "clamped at 20": (lambda m, x: column(torch.arange(s(x)).clamp(max=20)), Counting(0, 1)),
    "modulo 7": (lambda m, x: column(torch.arange(s(x)) % 7), Counting(0, 1)),
    "logarithm": (lambda m, x: column((torch.arange(s(x)) + 1.0).log()), Counting(0, 1)),
    "sinusoids": (lambda m, x: torch.outer(torch.arange(s(x)).double(), m.vector).sin(), Counting(0, 1)),
}

# Functions of the length, of the sequence, or of the tokens; some of them count at most lengths.
OTHERS = {
    "slowed down where no probe reaches": lambda m, x: column(torch.arange(s(x)) / torch.sym_max(1, s(x) // 3000)),
    "slowed down by a sum of ones": lambda m, x: column(
        torch.arange(s(x)) // (torch.ones(s(x)).sum() // 3000).clamp(min=1)
    ),
    "nothing at 67, 127, ...": lambda m, x: column(torch.arange(s(x)) * (torch.full((), s(x)) % 60 != 7)),
    "shifted from 50 on": lambda m, x: column(torch.arange(s(x)) + 3 * (torch.full((), s(x)) // 50)),
    "shifted at 60": lambda m, x: column(torch.ones(s(x)).long().cumsum(0) - 1 + (torch.full((), s(x)) == 60)),
    "rolled by the length": lambda m, x: column(torch.arange(s(x)).roll(s(x) // 3000)),
    "sorted": lambda m, x: column(
        torch.argsort(torch.arange(s(x)) * (1 - 2 * (torch.full((), s(x)) // 80 == 5).long()))
    ),
    "distance from the end": lambda m, x: column(torch.arange(s(x)).flip(0)),
    "length less position": lambda m, x: column(s(x) - torch.arange(s(x))),
    "position over length": lambda m, x: column(torch.arange(s(x)) / s(x)),
    "last rows of a table": lambda m, x: m.table[-s(x) :],
    "mean of the positions": lambda m, x: column(torch.arange(s(x)) - torch.arange(s(x)).double().mean()),
    "rank of random numbers": lambda m, x: column(torch.rand(s(x)).argsort(0)),
    "number of the sequence": lambda m, x: torch.arange(x.size(0))[:, None, None] * torch.ones(s(x), 1),
}


def rewritable(functions: dict) -> tuple[CapturedGraph, Inference, dict[str, Node]]:
    """Each function's own node is kept in sight by adding it to the tokens."""
    graph = captured(Cases({name: (lambda m, x, f=f: x + f(m, x)) for name, f in functions.items()}))
    Canonicalize().apply(graph)
    return graph, token_axes(graph), dict(zip(functions, outputs(graph)[1:], strict=True))


@pytest.fixture(scope="module")
def positions() -> tuple[CapturedGraph, Inference, dict[str, Node]]:
    return rewritable({name: case[0] for name, case in POSITIONS.items()})


@pytest.fixture(scope="module")
def others() -> tuple[CapturedGraph, Inference, dict[str, Node]]:
    return rewritable(OTHERS)


def sources_of(node: Node) -> list[Node]:
    found, stack = [], [node]
    while stack:
        current = stack.pop()
        if SOURCE in current.meta:
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", POSITIONS)
def test_functions_of_the_position_are_token_wise(positions, name: str) -> None:
    _, inference, nodes = positions
    result = inference.results[nodes[name]]
    assert not isinstance(result, Mixed), result.reason
    assert show(result) == "B S 6"
    (source,) = {type(n.meta[SOURCE]): n for n in sources_of(nodes[name])}.values()
    expected = POSITIONS[name][1]
    if isinstance(expected, Counting):
        assert source.meta[SOURCE] == expected
    elif expected is not None:
        assert isinstance(source.meta[SOURCE], expected)


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_counts_positions(others, name: str) -> None:
    _, inference, nodes = others
    assert isinstance(inference.results[nodes[name]], Mixed), show(inference.results[nodes[name]])


def test_sources_rebuilt_for_any_positions_give_what_the_sequence_gives() -> None:
    """Positions far apart and beyond every threshold, in any order: the value of a whole sequence at those places."""
    graph, _, nodes = rewritable({name: case[0] for name, case in POSITIONS.items()})
    wanted_at = torch.tensor([0, 41, 19, 20, 21, 7, 61, 3])
    length = 62
    ids = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad():
        whole = dict(zip(nodes, graph.module(ids)[1:], strict=True))
    evaluator = ShapeEvaluator(graph, classify(graph))
    sources = [n for n in graph.graph.nodes if SOURCE in n.meta and n.users]
    tables = {n: evaluator.evaluate(n, 1, length) for n in sources if isinstance(n.meta[SOURCE], Tabulated)}
    with graph.graph.inserting_after(graph.input_ids):
        given = graph.graph.placeholder("positions")
    with graph.fake_mode:
        given.meta["val"] = torch.empty(graph.input_ids.meta["val"].shape[1], dtype=torch.int64)
    for node in sources:
        source = node.meta[SOURCE]
        if node in tables:  # as insert-cache does, for the longest sequence
            source = Tabulated(tables[node], source.dim)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(source.rebuild(graph, node, given))
    graph.tidy()
    with torch.no_grad():
        results = dict(zip(nodes, graph.module(ids[:, : len(wanted_at)], wanted_at)[1:], strict=True))
    for name, result in results.items():
        torch.testing.assert_close(result[0], whole[name][0, wanted_at], msg=lambda text, n=name: f"{n}: {text}")


def test_a_count_that_stops_where_no_constant_says_so_is_not_taken_for_counting() -> None:
    """The threshold 100 stands nowhere in the graph: `position * 0.01 < 1`."""
    functions = {"stops at 100": lambda m, x: column((torch.arange(s(x)) * 0.01 < 1).cumsum(0))}
    _, inference, nodes = rewritable(functions)
    assert isinstance(inference.results[nodes["stops at 100"]], tuple)
    assert [type(n.meta[SOURCE]) for n in sources_of(nodes["stops at 100"])] == [Tabulated]


REASONS = {
    "nothing at 67, 127, ...": (
        lambda m, x: column(torch.arange(s(x)) * (torch.full((), s(x)) % 60 != 7)),
        "at a length of 7 tokens position 1 is 0, and not 1",
    ),
    "shifted from 100 on": (
        lambda m, x: column(torch.arange(s(x)) + 3 * (torch.full((), s(x)) // 100)),
        "at a length of 100 tokens position 0 is 3, and not 0",
    ),
    "shifted by an unread op": (
        lambda m, x: column(torch.arange(s(x)) + torch.ones(s(x)).norm().long() // 9),
        "it may change with the length of the sequence: `linalg_vector_norm` is an op of which nothing is known",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_refusal_says_where_positions_are_others(name: str) -> None:
    function, reason = REASONS[name]
    graph = captured(Cases({name: lambda m, x: x + function(m, x)}))
    Canonicalize().apply(graph)
    (node,) = outputs(graph)[1:]
    assert isinstance(token_axes(graph).results[node], Mixed)
    assert next(n.meta[NO_SOURCE] for n in graph.graph.nodes if NO_SOURCE in n.meta) == reason


@pytest.mark.parametrize(("name", "rows"), [("a row for four positions", 4 * 64), ("a row from before", 64 + 5)])
def test_a_table_that_is_looked_up_limits_the_length(positions, name: str, rows: int) -> None:
    graph, inference, nodes = positions
    evaluator = ShapeEvaluator(graph, classify(graph))
    (lookup,) = (n for n in nodes[name].all_input_nodes if is_call(n, torch.ops.aten.index))
    assert table_limit(graph, inference, evaluator, lookup, CacheConfig()) == rows


def test_the_largest_length_that_works_is_found() -> None:
    assert largest(lambda n: n <= 37, 100) == 37
    assert largest(lambda n: True, 100) == 100
    assert largest(lambda n: False, 100) == 0
