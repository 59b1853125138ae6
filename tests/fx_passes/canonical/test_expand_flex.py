"""`flex_attention` is written out with its own numbers, or stays and is refused by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kvpass.fx_passes.attention.find_attention import FindAttention
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.expand_flex import expand_flex_attention
from tests.fx_passes.tracing import VOCAB, captured

HEADS, DIM = 2, 4


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


class Flex(nn.Module):
    """Grouped heads, a table looked up by head and distance in score_mod, a mask_mod."""

    def __init__(self, form: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, (HEADS + 2) * DIM)
        self.register_buffer("table", torch.randn(HEADS, 8))
        self.form = form

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x = self.embed(ids).unflatten(-1, (HEADS + 2, DIM)).transpose(1, 2)
        q, k, v = x[:, :HEADS], x[:, HEADS : HEADS + 1], x[:, HEADS + 1 :]
        table, s = self.table, ids.size(1)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 2 * torch.tanh(score / 2) + table[h, (i - j).clamp(0, 7)]

        mask = create_block_mask(causal, None, None, s, s, device="cpu", BLOCK_SIZE=16)
        if self.form == "lists leave out blocks":
            mask = BlockMask.from_kv_blocks(
                mask.kv_num_blocks.clamp(max=1), mask.kv_indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(s, s)
            )
        if self.form == "sum is used as well":
            out, total = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
            return (self.joined(out * total[..., None]),)
        return (self.joined(flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)),)

    def joined(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_written_out_with_the_same_numbers() -> None:
    model = Flex()
    graph = captured(model)
    Canonicalize().apply(graph)  # which also turns views, that pin strides, into reshapes
    assert not [n for n in graph.graph.nodes if "flex" in n.name]
    ids = torch.randint(0, VOCAB, (3, 37))
    with torch.no_grad():
        torch.testing.assert_close(graph.module(ids)[0], model(ids)[0])
    found = FindAttention().apply(graph)
    assert found.rewritten == 1 and not found.refusals


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["lists leave out blocks", "sum is used as well"])
def test_stays_where_it_cannot_be(form: str) -> None:
    graph = captured(Flex(form))
    assert expand_flex_attention(graph) == 0
    assert [n for n in graph.graph.nodes if n.name == "flex_attention"]
