"""Steps with a tree mask: what is refused, and what their verification finds out."""

import pytest
import torch
from torch.fx import Graph, GraphModule

import kvpass
from kvpass.errors import ConfigError, InputError, VerificationError
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.tree_steps import PLACES, with_tree_mask
from kvpass.fx_passes.validation.verify_trees import verify_trees
from kvpass.types import Refusal, StepInputs
from tests.parity.compiled import engine_of

DECODER = "band of triu and tril, rotary"


@pytest.fixture
def module():
    """A compiled decoder with a window, whose graph with a tree mask is made anew and may be spoilt."""
    module = engine_of(DECODER).module
    module.__dict__.pop("tree_step", None)
    yield module
    module.__dict__.pop("tree_step", None)


def test_whatever_else_asks_for_places_is_refused():
    graph = Graph()
    names = [graph.placeholder(name) for name in (*PLACES, "logits_index")]
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (names[1], names[3])))
    refusal = with_tree_mask(GraphModule({}, graph))
    assert isinstance(refusal, Refusal) and "asks for the places of tokens" in refusal.reason
    assert refusal.node.startswith("add")


@pytest.mark.slow
def test_the_graph_without_a_mask_stays_as_it_was(module):
    before = module.graph_module.code
    assert "tree_mask" not in before and "tree_step" not in module.__dict__
    assert "tree_mask" in module.tree_step.code and module.graph_module.code == before
    # The same tensors, not copies.
    ours, theirs = dict(module.graph_module.named_parameters()), dict(module.tree_step.named_parameters())
    assert ours.keys() >= theirs.keys() and all(ours[name] is theirs[name] for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no mask", "positions by place"])
def test_the_verification_finds_a_tree_that_is_computed_as_a_chain(module, fault):
    assert verify_trees(module).passed
    inputs = [node.name for node in module.tree_step.graph.nodes if node.op == "placeholder"]
    tree, mask, positions = module.tree_step, inputs.index("tree_mask"), inputs.index("positions")

    def spoilt(*arguments):
        arguments = list(arguments)
        if fault == "no mask":
            return module.graph_module(*arguments[:mask], *arguments[mask + 1 :])
        first = arguments[positions][:1]
        arguments[positions] = first + torch.arange(len(arguments[positions]))
        return tree(*arguments)

    module.__dict__["tree_step"] = spoilt
    assert not verify_trees(module).passed
    engine = kvpass.Engine(module, module.plan, kvpass.CacheConfig(num_blocks=8), engine_of(DECODER).report)
    with pytest.raises(VerificationError, match="trees of drafts give other logits than sequences"):
        engine.speculate(kvpass.PromptLookup(branches=2))
    engine.speculate(kvpass.PromptLookup())


@pytest.mark.slow
@pytest.mark.slow
def test_a_refusal_is_said_where_a_tree_is_asked_for(module):
    module.__dict__["tree_step"] = Refusal("it asks for the places of tokens", "add_3")
    engine = kvpass.Engine(module, module.plan, kvpass.CacheConfig(num_blocks=8), engine_of(DECODER).report)
    with pytest.raises(ConfigError, match="takes no trees of drafts: it asks for the places of tokens at node add_3"):
        engine.speculate(kvpass.PromptLookup(branches=2))
    one = torch.zeros(1, dtype=torch.int64)
    groups = len(module.plan.group_windows)
    step = StepInputs(
        one, one, one.expand(groups, 1), one.expand(groups, 1, 1), one + 1, torch.tensor([0, 1]), one,
        torch.ones(1, 1, dtype=torch.bool),
    )  # fmt: skip
    assert isinstance(module, PagedModule)
    with pytest.raises(InputError, match="cannot have a tree mask"):
        module(step, engine.caches)
