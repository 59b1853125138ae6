"""Rotations around int4 caches become part of the weights of linear maps next to them, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.types import FoldedRotation
from tests.fx_passes.drawn_weights import DrawnWeights, Weight
from tests.fx_passes.paged_sites import CONFIG, Rewritten, rewrite

WIDTH, HEADS, KV_HEADS, DIM = 96, 4, 2, 8  # keys and values are narrower than what they come from

Spelling = Callable[[Tensor, Weight], Tensor]


def split(x: Tensor, count: int) -> Tensor:
    """`[B, S, count * D]` -> `[B, count, S, D]`."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(x: Tensor, w: Weight, v: Tensor, heads: int = HEADS, dim: int = DIM) -> Tensor:
    """Keys and queries that nothing rotates, from weights of their own; `v [B, H, S, D]`."""
    q, k = split(F.linear(x, w(heads * dim, WIDTH)), heads), split(F.linear(x, w(v.size(1) * dim, WIDTH)), v.size(1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=v.size(1) < heads)


def grouped(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(KV_HEADS * DIM, WIDTH)), KV_HEADS)
    return F.linear(merge(attend(x, w, v)), w(WIDTH, HEADS * DIM), w(WIDTH))


def biased_matmul(x: Tensor, w: Weight) -> Tensor:
    v = split(x @ w(WIDTH, HEADS * DIM) + w(HEADS * DIM), HEADS)
    return merge(attend(x, w, v)) @ w(HEADS * DIM, WIDTH) + w(WIDTH)


def packed(x: Tensor, w: Weight) -> Tensor:
    """One projection with a bias to queries, keys and values, heads outermost."""
    q, k, v = F.linear(x, w(HEADS * 3 * DIM, WIDTH), w(HEADS * 3 * DIM)).unflatten(-1, (HEADS, 3, DIM)).unbind(-2)
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    return F.linear(merge(out), w(WIDTH, HEADS * DIM))


def blocks_of_four(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(HEADS * 12, WIDTH), w(HEADS * 12)), HEADS)
    return F.linear(merge(attend(x, w, v, dim=12)), w(WIDTH, HEADS * 12))


def a_projection_for_each_head(x: Tensor, w: Weight) -> Tensor:
    v = torch.stack([F.linear(x, w(DIM, WIDTH)) for _ in range(KV_HEADS)], 1)
    return F.linear(merge(attend(x, w, v)), w(WIDTH, HEADS * DIM))


def interleaved_heads(x: Tensor, w: Weight) -> Tensor:
    v = F.linear(x, w(DIM * HEADS, WIDTH)).unflatten(-1, (DIM, HEADS)).permute(0, 3, 1, 2)
    return F.linear(attend(x, w, v).permute(0, 2, 3, 1).flatten(2), w(WIDTH, DIM * HEADS))


def gate_per_head(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(HEADS * DIM, WIDTH)), HEADS)
    gate = F.linear(x, w(HEADS, WIDTH)).sigmoid().transpose(1, 2).unsqueeze(-1)
    return F.linear(merge(attend(x, w, v) * gate / 2), w(WIDTH, HEADS * DIM))


def two_readers(x: Tensor, w: Weight) -> Tensor:
    out = merge(attend(x, w, split(F.linear(x, w(HEADS * DIM, WIDTH)), HEADS)))
    return F.linear(out, w(WIDTH, HEADS * DIM)) + F.linear(out[..., : 2 * DIM], w(WIDTH, 2 * DIM))


def gate_per_entry(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(HEADS * DIM, WIDTH)), HEADS)
    gate = F.linear(x, w(HEADS * DIM, WIDTH)).sigmoid()
    return F.linear(merge(attend(x, w, v)) * gate, w(WIDTH, HEADS * DIM))


def values_read_twice(x: Tensor, w: Weight) -> Tensor:
    v = F.linear(x, w(HEADS * DIM, WIDTH))
    return F.linear(merge(attend(x, w, split(v, HEADS))), w(WIDTH, HEADS * DIM)) + v.sum(-1, keepdim=True)


def activated(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(HEADS * DIM, WIDTH)).tanh(), HEADS)
    return F.linear(merge(attend(x, w, v)).relu(), w(WIDTH, HEADS * DIM))


def half_a_block_read(x: Tensor, w: Weight) -> Tensor:
    v = split(F.linear(x, w(HEADS * DIM, WIDTH)), HEADS)
    return F.linear(attend(x, w, v)[..., 2:].transpose(1, 2).flatten(2), w(WIDTH, HEADS * (DIM - 2)))


def blocks_of_two_maps(x: Tensor, w: Weight) -> Tensor:
    halves = [split(F.linear(x, w(HEADS * DIM // 2, WIDTH)), HEADS) for _ in range(2)]
    out = attend(x, w, torch.cat(halves, -1))
    return F.linear(out.transpose(1, 2), w(WIDTH // HEADS, DIM)).flatten(2)  # one map for all heads


SPELLINGS: dict[Spelling, tuple[str, str]] = {
    grouped: ("", ""),
    biased_matmul: ("", ""),
    packed: ("", ""),
    blocks_of_four: ("", ""),
    a_projection_for_each_head: ("", ""),
    interleaved_heads: ("", ""),
    gate_per_head: ("", ""),
    two_readers: ("", ""),
    gate_per_entry: ("", "aten.mul.Tensor] reads its result"),
    values_read_twice: ("aten.sum.dim_IntList] reads the same entries", ""),
    activated: ("aten.tanh.default] computes its rows", "aten.relu.default] reads its result"),
    half_a_block_read: ("", "reads a part of a block, or an entry twice"),
    blocks_of_two_maps: ("a block is put together from several linear maps", "rows that are put together differently"),
}


class RotatedSites(DrawnWeights):
    """One attention for each spelling, one after the other."""

    def __init__(self) -> None:
        super().__init__(WIDTH, spread=0.1)

    def compute(self, x: Tensor, weight: Weight) -> Tensor:
        for spelling in SPELLINGS:
            x = F.layer_norm(x + spelling(F.layer_norm(x, (WIDTH,)), weight), (WIDTH,))
        return x


@pytest.fixture(scope="module")
def rewritten() -> Rewritten:
    model = RotatedSites()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rewrite(model, CONFIG, "int4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found


def folds(rewritten: Rewritten, spelling: Spelling) -> dict[str, FoldedRotation]:
    index = rewritten.plan.sites[list(SPELLINGS).index(spelling)].cache
    return {each.role: each for each in rewritten.paged.rotations if each.cache.endswith(f"_cache_{index}")}


@pytest.mark.slow
@pytest.mark.sampled(13, 2)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_what_is_folded_and_why_not(rewritten: Rewritten, spelling: Spelling) -> None:
    found = folds(rewritten, spelling)
    assert set(found) == {"key", "value", "query", "output"}
    for role, reason in zip(("value", "output"), SPELLINGS[spelling], strict=True):
        got = found[role].reason
        assert (reason in got) if reason else got == ""
    assert found["key"].reason == found["query"].reason == "", "nothing stands between these and their linear maps"


def test_every_attention_gives_the_same_and_so_does_the_whole(rewritten: Rewritten) -> None:
    for got, wanted in zip(
        [*rewritten.got, rewritten.got_logits], [*rewritten.wanted, rewritten.wanted_logits], strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_a_step_computes_only_the_rotations_that_stay(rewritten: Rewritten) -> None:
    computed = [n for n in rewritten.paged.module.graph.nodes if n.target is torch.ops.aten.matmul.default]
    computed = [n for n in computed if n.args[1].op == "get_attr" and n.args[1].target.startswith("_hadamard")]
    assert len(computed) == sum(each.reason != "" for each in rewritten.paged.rotations) > 0


def test_memory_grows_by_the_derived_weights_that_are_reported(rewritten: Rewritten) -> None:
    parameters = [*rewritten.model.parameters(), *rewritten.paged.module.parameters()]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    own = sum(p.nbytes for p in rewritten.model.parameters())
    assert rewritten.paged.derived_bytes > 0
    assert sum(held.values()) == own + rewritten.paged.derived_bytes
