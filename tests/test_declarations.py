"""Custom ops go through the proof by what their owner says of them, and not by their names or tags."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass
from kvpass.fx_passes.op_facts.declared import DECLARED, MEANINGS
from tests.parity.harness import CONFIG, assert_tokens_equal, ragged_prompts

VOCAB, WIDTH, HEADS = 61, 32, 4


@torch.library.custom_op("kvpass_test::packed_linear", mutates_args=())
def packed_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """A linear map with weights in int8."""
    return x @ (codes.to(x.dtype) * scale).T


@packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("kvpass_test::leaky_linear", mutates_args=())
def leaky_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same, with a little of the last token in every row."""
    return (x + 0.05 * x[..., -1:, :]) @ (codes.to(x.dtype) * scale).T


leaky_linear.register_fake(packed_linear._abstract_fn)


@torch.library.custom_op("kvpass_test::counting_linear", mutates_args=())
def counting_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same, with the place of a row in it."""
    return (x + 0.1 * torch.arange(x.shape[-2])[:, None]) @ (codes.to(x.dtype) * scale).T


counting_linear.register_fake(packed_linear._abstract_fn)


@torch.library.custom_op("kvpass_test::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by a kernel of somebody's own."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[-2])
    near = (places[:, None] >= places) & (places[:, None] - places < 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


class Decoder(nn.Module):
    """One block whose projections, or attention, are custom ops."""

    def __init__(self, linear: str = "", attention: str = "") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.project, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.linear, self.attention = linear, attention
        self.register_buffer("codes", torch.randint(-99, 99, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.full((WIDTH, 1), 0.01))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        attend = getattr(torch.ops.kvpass_test, self.attention) if self.attention else causal
        y = self.mix(attend(q, k, v).transpose(1, 2).flatten(2))
        if self.linear:
            y = getattr(torch.ops.kvpass_test, self.linear)(y, self.codes, self.scale)
        return self.head(x + y)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for table in (DECLARED, MEANINGS):
        for op in [op for op in table if str(op).startswith("kvpass_test")]:
            del table[op]


def test_an_op_that_nobody_declared_is_refused_by_name() -> None:
    with pytest.raises(kvpass.RefusedError, match="is an op for which kvpass has no proof"):
        kvpass.compile(Decoder(linear="packed_linear").eval(), CONFIG)


def test_a_declared_linear_map_goes_through_and_is_named_in_the_report() -> None:
    kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=("x",))
    model = Decoder(linear="packed_linear").eval()
    engine = kvpass.compile(model, CONFIG)
    assert engine.report.declared == ("kvpass_test.packed_linear",)
    assert "declared, not proven: kvpass_test.packed_linear" in str(engine.report)
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB), 8)


def test_a_model_without_the_op_has_nothing_declared() -> None:
    kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=("x",))
    assert kvpass.compile(Decoder().eval(), CONFIG).report.declared == ()


@pytest.mark.parametrize(
    ("op", "complaint"),
    [
        ("leaky_linear", r"changing row \(.*\) of `x` changed row \(.*, 0\) of the result"),
        ("counting_linear", r"with its rows moved on along dim 1 the result is another one in row"),
    ],
)
def test_a_declaration_that_does_not_hold_is_refused_with_the_row_that_broke_it(op: str, complaint: str) -> None:
    kvpass.declare_tokenwise(f"kvpass_test::{op}", tokens=("x",))
    with pytest.raises(kvpass.RefusedError, match=complaint):
        kvpass.compile(Decoder(linear=op).eval(), CONFIG)


def test_an_operand_that_was_not_declared_to_carry_tokens_may_not() -> None:
    class FromTokens(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(
                torch.ops.kvpass_test.packed_linear(x, self.codes, self.scale * x.mean())
            ) + super().forward(ids)

    kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=("x",))
    with pytest.raises(kvpass.RefusedError, match="takes its scale from the tokens"):
        kvpass.compile(FromTokens().eval(), CONFIG)


def test_a_declared_attention_is_the_function_that_it_means() -> None:
    kvpass.declare_meaning("kvpass_test::fused_attention", as_aten=causal)
    model = Decoder(attention="fused_attention").eval()
    engine = kvpass.compile(model, CONFIG)
    assert engine.report.declared == ("kvpass_test.fused_attention",)
    assert [site.mask for site in engine.report.sites] == ["causal"]
    assert_tokens_equal(model, engine, ragged_prompts(VOCAB), 8)


def test_a_meaning_that_the_op_does_not_have_is_refused() -> None:
    kvpass.declare_meaning("kvpass_test::fused_attention", as_aten=windowed)
    with pytest.raises(kvpass.RefusedError, match=r"op and function differ in row \(0, 0, 4\)"):
        kvpass.compile(Decoder(attention="fused_attention").eval(), CONFIG)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: kvpass.declare_tokenwise("kvpass_test::nothing", tokens=("x",)), "there is no op"),
        (lambda: kvpass.declare_tokenwise("packed_linear", tokens=("x",)), "there is no op"),
        (lambda: kvpass.declare_tokenwise("aten::linear", tokens=("input",)), "is no op of yours"),
        (lambda: kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=("y",)), "has no operand 'y'"),
        (lambda: kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=()), "name the operands"),
        (lambda: kvpass.declare_tokenwise("kvpass_test::packed_linear", tokens=("x",), dim=1), "counted from the end"),
        (lambda: kvpass.declare_meaning("kvpass_test::packed_linear", as_aten=3), "give a function"),
    ],
)
def test_what_cannot_be_declared_is_said(call, complaint: str) -> None:
    with pytest.raises(kvpass.InputError, match=complaint):
        call()
