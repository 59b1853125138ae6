"""Planted faults are caught: verify() fails for every wrong rewrite in a table, and passes for the right one."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kvpass.config import CacheConfig
from kvpass.fx_passes.graph import arguments, is_call
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.stages import lower, plan, prove
from kvpass.fx_passes.validation.verify import Comparison, reference_graph, verify
from kvpass.kernels.formats.cache_formats import allocate_cache
from kvpass.types import StepInputs
from tests.fx_passes.tracing import captured

VOCAB, WIDTH, HEADS, KV_HEADS, WINDOW = 29, 24, 4, 2, 6
aten, kvpass_ops = torch.ops.aten, torch.ops.kvpass


class Layer(nn.Module):
    """Tiled heads (query head h reads head h % 2), a window or ALiBi, a softcap, a sink: all that can go wrong."""

    def __init__(self, windowed: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.sink = nn.Parameter(torch.zeros(HEADS))
        self.windowed = windowed

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat(1, HEADS // KV_HEADS, 1, 1), v.repeat(1, HEADS // KV_HEADS, 1, 1)
        scores = 2 * torch.tanh(q @ k.mT * 0.4 / 2)
        distance = torch.arange(s)[:, None] - torch.arange(s)
        hidden = distance < 0
        if self.windowed:
            hidden = hidden | (distance >= WINDOW)
        else:
            scores = scores - distance * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        sinks = self.sink.view(1, -1, 1, 1).expand(b, -1, s, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return x + self.o((weights @ v).transpose(1, 2).reshape(b, s, WIDTH))


class Decoder(nn.Module):
    """Learned positions and two layers, drawn so wide that every token and position shows in the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(96, WIDTH)
        self.layers = nn.ModuleList([Layer(True), Layer(False)])
        self.head = nn.Linear(WIDTH, VOCAB)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(F.layer_norm(x, (WIDTH,)))


@dataclass
class Rewritten:
    """A right rewrite, to be spoilt again and again."""

    model: Decoder
    reference: GraphModule
    paged: PagedGraph

    def spoilt(self, fault: Callable[[GraphModule], None]) -> PagedGraph:
        module = self.paged.observed
        other = GraphModule(module, copy.deepcopy(module.graph))
        fault(other)
        other.graph.lint()
        other.recompile()
        return PagedGraph(other, self.paged.plan, other, self.paged.site_names)

    def check(self, paged: PagedGraph) -> Comparison:
        return verify(self.model, self.reference, paged, PagedModule(paged))


@pytest.fixture(scope="module")
def rewritten() -> Iterator[Rewritten]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Decoder().eval()
    graph = captured(model)
    config = CacheConfig(block_size=4)
    proof = prove(graph, config)
    assert proof.refusals == []
    planned = plan(proof, config, VOCAB)
    reference = reference_graph(graph, [site.node.name for site in planned.sites])
    yield Rewritten(model, reference, lower(proof, planned))
    torch.set_num_threads(threads)


def node(module: GraphModule, op: object, number: int = 0) -> Node:
    return [n for n in module.graph.nodes if is_call(n, op)][number]


def attention(module: GraphModule, number: int = 0) -> Node:
    return node(module, kvpass_ops.paged_attention, number)


def placeholder(module: GraphModule, name: str) -> Node:
    return next(n for n in module.graph.nodes if n.op == "placeholder" and n.name == name)


def set_argument(call: Node, name: str, value: object) -> None:
    """Give one argument of a call another value."""
    names = [a.name for a in call.target._schema.arguments]
    filled = arguments(call) | {name: value}
    call.args, call.kwargs = tuple(filled[n] for n in names), {}


def put_after(module: GraphModule, name: str, op: object, *rest: object) -> None:
    """Let all users of an input see it changed."""
    source = placeholder(module, name)
    last = [n for n in module.graph.nodes if n.op == "placeholder"][-1]
    users = list(source.users)
    with module.graph.inserting_after(last):
        changed = module.graph.call_function(op, (source, *rest))
    for user in users:
        user.replace_input_with(source, changed)


def change_buffer(module: GraphModule, start: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor of the rewrite's own."""
    read = next(n for n in module.graph.nodes if n.op == "get_attr" and n.target.startswith(start))
    value = change(getattr(module, read.target))
    read.target = f"spoilt_{read.target}"
    module.register_buffer(read.target, value, persistent=False)


def exchange(call: Node, first: str, second: str) -> None:
    named = arguments(call)
    set_argument(call, first, named[second])
    set_argument(call, second, named[first])


def same_blocks(call: Node, other: Node, name: str) -> None:
    """Let a call use the slots or the table of another, whose layer has another window and so blocks of its own."""
    assert arguments(call)[name] is not arguments(other)[name]
    set_argument(call, name, arguments(other)[name])


def positions_by_row(module: GraphModule) -> None:
    put_after(module, "positions", aten.cumsum.default, 0)
    counted = next(n for n in module.graph.nodes if is_call(n, aten.cumsum))
    with module.graph.inserting_before(counted):
        counted.replace_input_with(
            counted.args[0], module.graph.call_function(aten.ones_like.default, counted.args[:1])
        )


def zero_keys(module: GraphModule) -> None:
    write = node(module, kvpass_ops.write_cache)
    with module.graph.inserting_before(write):
        set_argument(write, "key", module.graph.call_function(aten.zeros_like.default, (write.args[0],)))


def write_after_reading(module: GraphModule) -> None:
    attention(module).append(node(module, kvpass_ops.write_cache))


def scaled(call: Node, name: str, factor: float) -> None:
    set_argument(call, name, arguments(call)[name] * factor)


def drop_residual(module: GraphModule) -> None:
    add = [n for n in module.graph.nodes if is_call(n, aten.add) and n.all_input_nodes[0] is not n.all_input_nodes[-1]][
        -1
    ]
    add.replace_all_uses_with(add.args[1])


def heads_reversed(module: GraphModule) -> None:
    change_buffer(module, "_head_order", lambda order: order.flip(0))


FAULTS: dict[str, Callable[[GraphModule], None]] = {
    "positions are zero": lambda m: put_after(m, "positions", aten.zeros_like.default),
    "positions start at one": lambda m: put_after(m, "positions", aten.add.Tensor, 1),
    "positions are the rows of the step": lambda m: positions_by_row(m),
    "window one shorter": lambda m: set_argument(attention(m), "window", WINDOW - 1),
    "window one longer": lambda m: set_argument(attention(m), "window", WINDOW + 1),
    "no window": lambda m: set_argument(attention(m), "window", None),
    "a window where there is none": lambda m: set_argument(attention(m, 1), "window", 16),
    "scale a tenth too large": lambda m: scaled(attention(m), "scale", 1.1),
    "scale negated": lambda m: scaled(attention(m), "scale", -1),
    "no softcap": lambda m: set_argument(attention(m), "softcap", None),
    "softcap doubled": lambda m: scaled(attention(m, 1), "softcap", 2.0),
    "no sinks": lambda m: set_argument(attention(m), "sinks", None),
    "no slopes": lambda m: set_argument(attention(m, 1), "slopes", None),
    "slopes of other heads": lambda m: change_buffer(m, "_slopes", lambda t: t.roll(1)),
    "slopes negated": lambda m: change_buffer(m, "_slopes", lambda t: -t),
    "keys and values exchanged": lambda m: exchange(node(m, kvpass_ops.write_cache), "key", "value"),
    "caches exchanged when read": lambda m: exchange(attention(m), "key_cache", "value_cache"),
    "keys are zero": zero_keys,
    "head order reversed": heads_reversed,
    "head order as it stands": lambda m: change_buffer(m, "_head_order", lambda t: torch.arange(len(t))),
    "results in another order of heads": lambda m: change_buffer(m, "_head_places", lambda t: t.roll(1)),
    "nothing is written": lambda m: m.graph.erase_node(node(m, kvpass_ops.write_cache)),
    "second layer is not written": lambda m: m.graph.erase_node(node(m, kvpass_ops.write_cache, 1)),
    "written after it is read": write_after_reading,
    "slots shifted by one": lambda m: put_after(m, "slot_mapping", aten.bitwise_xor.Scalar, 1),
    "written to the other layer's blocks": lambda m: same_blocks(
        node(m, kvpass_ops.write_cache, 1), node(m, kvpass_ops.write_cache), "slot_mapping"
    ),
    "read from the other layer's blocks": lambda m: same_blocks(attention(m, 1), attention(m), "block_tables"),
    "block tables reversed": lambda m: put_after(m, "block_tables", aten.flip.default, [1]),
    "logits of other rows": lambda m: put_after(m, "logits_index", aten.flip.default, [0]),
    "one residual lost": drop_residual,
}


def test_a_right_rewrite_passes(rewritten: Rewritten) -> None:
    found = rewritten.check(rewritten.paged)
    assert found.passed and max(found.errors.values()) < 1e-5
    assert max(found.site_errors.values()) < 1e-5
    assert found.history_effect > 100 * max(found.errors.values()), "this model would not show a lost token"


def test_an_unchanged_copy_passes(rewritten: Rewritten) -> None:
    assert rewritten.check(rewritten.spoilt(lambda module: None)).passed


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(rewritten: Rewritten, fault: str) -> None:
    found = rewritten.check(rewritten.spoilt(FAULTS[fault]))
    assert not found.passed, f"{fault}: errors {found.errors}"


def test_every_way_of_running_is_checked(rewritten: Rewritten) -> None:
    assert set(rewritten.check(rewritten.paged).errors) >= {
        "prefill",
        "ragged prefill in chunks",
        "shared prefix",
        "decode",
    }


# The rest looks at the right rewrite: what insert-cache and bind promise.


def step(length: int, rows: Tensor, device: str = "cpu") -> StepInputs:
    every = torch.arange(length)
    return StepInputs(
        token_ids=every * 5 % VOCAB,
        positions=every,
        slot_mapping=every[None],
        block_tables=torch.arange(-(-length // 4))[None, None],
        seq_lens=torch.tensor([length]),
        query_start=torch.tensor([0, length]),
        logits_index=rows,
    )


def run(rewritten: Rewritten, length: int, rows: Tensor) -> Tensor:
    caches = [allocate_cache(spec, 8, 4, "cpu") for spec in rewritten.paged.plan.caches]
    with torch.no_grad():
        return PagedModule(rewritten.paged)(step(length, rows), caches)


def test_logits_of_chosen_rows_are_those_of_all_rows(rewritten: Rewritten) -> None:
    everything = run(rewritten, 13, torch.arange(13))
    with torch.no_grad():
        wanted = rewritten.model((torch.arange(13) * 5 % VOCAB)[None])[0]
    torch.testing.assert_close(everything, wanted, rtol=1e-5, atol=1e-5)
    for rows in ([12], [0, 12], [3, 3, 1], list(range(13))):
        torch.testing.assert_close(run(rewritten, 13, torch.tensor(rows)), everything[rows], rtol=1e-5, atol=1e-6)


def test_rows_are_selected_right_after_the_last_residual(rewritten: Rewritten) -> None:
    nodes = list(rewritten.paged.module.graph.nodes)
    (index,) = placeholder(rewritten.paged.module, "logits_index").users
    after = [n for n in nodes[nodes.index(index) :] if is_call(n, aten.linear, aten.addmm, aten.mm)]
    assert len(after) == 1, "the head alone comes after, and runs for the chosen rows only"
    assert is_call(index.args[0], aten.add)


def test_no_dense_attention_is_left_and_caches_are_mutable_arguments(rewritten: Rewritten) -> None:
    graph = rewritten.paged.module.graph
    assert not [n for n in graph.nodes if is_call(n, kvpass_ops.dense_attention)]
    writes = [n for n in graph.nodes if is_call(n, kvpass_ops.write_cache)]
    assert len(writes) == len(rewritten.paged.plan.caches) == 2
    for write in writes:
        written = [a.name for a in write.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert written == ["key_cache", "value_cache"]
        assert all(arguments(write)[name].op == "placeholder" for name in written)


def test_the_parameters_are_the_models_own(rewritten: Rewritten) -> None:
    """Those of queries, keys and values lie one after the other and are read as one."""
    mine, bound = list(rewritten.model.parameters()), list(PagedModule(rewritten.paged).parameters())
    assert {p.untyped_storage().data_ptr() for p in bound} == {p.untyped_storage().data_ptr() for p in mine}
    assert sum(p.nbytes for p in bound) == sum(p.nbytes for p in mine)
